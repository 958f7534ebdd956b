"""The tokenizer of a run, and whether it belongs to the model."""

from __future__ import annotations

from collections.abc import Iterator

from pretune.checkpoint.identity import newest_state
from pretune.core.config import ConfigError, InputError, UserError
from pretune.data.added_tokens import lacking_tokens
from pretune.data.config import AddTokens, DataConfig, FileTokenizer
from pretune.data.tokenizer import Tokenizer, load_tokenizer, saved_tokenizer
from pretune.data.tokenizer_files import TOKENIZER
from pretune.run.config import RunConfig
from pretune.run.folder import cache_folder
from pretune.run.pretrained import PretrainedModel
from pretune.run.teacher_start import TEACHER, find_teacher
from pretune.run.weights import Start, own_folder, start_of


def assemble_tokenizer(config: RunConfig) -> Tokenizer:
    """The run's tokenizer: the saved one; else, if inherited, that of the run or model it starts from, or else that it
    learns from; else as configured.

    Raises InputError if its files are damaged or the run was trained with another one; ConfigError if it has more
    tokens than the model's vocabulary (added ones aside: the model grows by them), or if the model that the run starts
    from knows its tokens by other ids.
    """
    section, folder = config.data.tokenizer, own_folder(config)
    if folder.tokenizer.is_dir():
        tokenizer = saved_tokenizer(folder.tokenizer, config.data)
    elif section.kind == "inherited":
        start = start_of(config) or find_teacher(config)
        assert start is not None  # RunConfig ensures it
        tokenizer = _tokenizer_of(start, config.data, section.add_tokens)
    else:
        tokenizer = load_tokenizer(section, config.data, cache_folder())
        _check_ids(tokenizer, config)
    state = newest_state(folder.checkpoints)
    if state is not None and state.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise InputError(
            f"{folder.path} was trained with another tokenizer than {folder.tokenizer} or data.tokenizer gives now; "
            "restore it"
        )
    size = next(iter(tokenizer.added_ids), tokenizer.vocab_size)
    if size > config.model.vocab_size:
        advice = f"set model.vocab_size={size} or choose another tokenizer"
        if config.stage.init_from is not None:
            advice = f"it is not the tokenizer of {config.stage.init_from}"
        raise ConfigError(
            f"the tokenizer has {size} tokens, the model's vocabulary only {config.model.vocab_size}; {advice}"
        )
    return tokenizer


def _tokenizer_of(start: Start, data: DataConfig, add_tokens: AddTokens = ()) -> Tokenizer:
    if isinstance(start, PretrainedModel):
        section = FileTokenizer(kind="file", path=str(start.tokenizer), eos=None, add_tokens=add_tokens)
        return load_tokenizer(section, data, cache_folder())
    if not start.tokenizer.is_dir():
        raise InputError(f"{start.path} has no tokenizer folder; set data.tokenizer to what it was trained with")
    return saved_tokenizer(start.tokenizer, data, add_tokens)


def check_ids_of_teacher(tokenizer: Tokenizer, teacher: Start, data: DataConfig) -> None:
    """Raise ConfigError unless each token of the run is the same one for its teacher."""
    theirs = _tokenizer_of(teacher, data).backend.get_vocab()
    ours = tokenizer.backend.get_vocab()
    other = next((token for token, index in ours.items() if theirs.get(token) != index), None)
    if other is not None:
        there = "is not among its tokens" if other not in theirs else f"has id {theirs[other]} there"
        raise ConfigError(
            f"{TEACHER}: {teacher.name} has another tokenizer than the run ({other!r} has id {ours[other]} here and "
            f"{there}), and says nothing of the run's tokens; take a teacher with the run's tokenizer, or "
            "the teacher's with data/tokenizer=inherited and random weights"
        )


def _check_ids(tokenizer: Tokenizer, config: RunConfig) -> None:
    """Raise ConfigError if the start of the run has a tokenizer that gives a token another id."""
    start = start_of(config)
    if start is None or not (start.tokenizer / TOKENIZER).is_file():
        return
    ids = tokenizer.backend.get_vocab()
    theirs = _tokenizer_of(start, config.data).backend.get_vocab()
    taken = {index: token for token, index in theirs.items()}
    if lost := [taken[index] for index in tokenizer.added_ids if index in taken]:
        raise ConfigError(
            f"data.tokenizer.add_tokens: {start.name}, which the run starts from, has {lost[0]!r} in the place of a "
            "new token: take its tokenizer with data/tokenizer=inherited, and leave out of add_tokens what it has"
        )
    other = next((token for token, index in theirs.items() if ids.get(token, index) != index), None)
    missing = sum(token not in ids for token in theirs)
    if other is not None or missing > len(theirs) // 2:
        reason = f"it has another id for {other!r}" if other is not None else f"it lacks {missing:,} of its tokens"
        raise ConfigError(
            f"data.tokenizer is not the tokenizer of {start.name}, which the run starts from ({reason}): take that one "
            "with data/tokenizer=inherited"
        )


def with_added_tokens(config: RunConfig) -> RunConfig:
    """`config` with a vocabulary of the model that is large enough for the tokens that the run adds.

    Raises what assemble_tokenizer raises. A plan does without a tokenizer that is not there, and counts a row per
    token.
    """
    asked = config.data.tokenizer.add_tokens
    if not asked:
        return config
    try:
        size = assemble_tokenizer(config).vocab_size
    except UserError:
        if config.task != "plan":
            raise
        size = config.model.vocab_size + planned_number(asked)
    model = config.model.model_copy(update={"vocab_size": max(size, config.model.vocab_size)})
    return config.model_copy(update={"model": model})


def planned_number(asked: AddTokens) -> int:
    """The number of tokens that are added, as far as it is known without a tokenizer."""
    return 2 if asked == "template" else len(asked)


def new_tokens(config: RunConfig) -> tuple[int, ...]:
    """The ids of the tokens that the run adds to those of its start."""
    return assemble_tokenizer(config).added_ids if config.data.tokenizer.add_tokens else ()


def notes_on_template(config: RunConfig, tokenizer: Tokenizer) -> Iterator[str]:
    """A line where a chat template of the run writes what looks like tokens, and the tokenizer takes for text."""
    lacking = list(lacking_tokens(config.data, tokenizer.template_tokens, [*tokenizer.backend.get_vocab()]))
    if lacking:
        yield (
            f"the chat template writes {', '.join(lacking)}, which the tokenizer splits into several tokens: "
            "data.tokenizer.add_tokens=template appends them as tokens of their own"
        )
