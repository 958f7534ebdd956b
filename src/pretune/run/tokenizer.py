"""The tokenizer of a run, and whether it belongs to the model."""

from __future__ import annotations

from pretune.checkpoint.identity import newest_state
from pretune.core.config import ConfigError, InputError
from pretune.data.config import DataConfig, FileTokenizer
from pretune.data.tokenizer import Tokenizer, load_tokenizer, saved_tokenizer
from pretune.data.tokenizer_files import TOKENIZER
from pretune.run.config import RunConfig
from pretune.run.folder import cache_folder
from pretune.run.pretrained import PretrainedModel
from pretune.run.weights import TEACHER, Start, find_teacher, own_folder, start_of


def assemble_tokenizer(config: RunConfig) -> Tokenizer:
    """The run's tokenizer: the saved one; else, if inherited, that of the run or model it starts from, or else that it
    learns from; else as configured.

    Raises InputError if its files are damaged or the run was trained with another one; ConfigError if it has more
    tokens than the model's vocabulary, or if the model that the run starts from knows its tokens by other ids.
    """
    section, folder = config.data.tokenizer, own_folder(config)
    if folder.tokenizer.is_dir():
        tokenizer = saved_tokenizer(folder.tokenizer, config.data)
    elif section.kind == "inherited":
        start = start_of(config) or find_teacher(config)
        assert start is not None  # RunConfig ensures it
        tokenizer = _tokenizer_of(start, config.data)
    else:
        tokenizer = load_tokenizer(section, config.data, cache_folder())
        _check_ids(tokenizer, config)
    state = newest_state(folder.checkpoints)
    if state is not None and state.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise InputError(
            f"{folder.path} was trained with another tokenizer than {folder.tokenizer} or data.tokenizer gives now; "
            "restore it"
        )
    if tokenizer.vocab_size > config.model.vocab_size:
        advice = f"set model.vocab_size={tokenizer.vocab_size} or choose another tokenizer"
        if config.stage.init_from is not None:
            advice = f"it is not the tokenizer of {config.stage.init_from}"
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary only {config.model.vocab_size}; "
            f"{advice}"
        )
    return tokenizer


def _tokenizer_of(start: Start, data: DataConfig) -> Tokenizer:
    if isinstance(start, PretrainedModel):
        return load_tokenizer(FileTokenizer(kind="file", path=str(start.tokenizer), eos=None), data, cache_folder())
    if not start.tokenizer.is_dir():
        raise InputError(f"{start.path} has no tokenizer folder; set data.tokenizer to what it was trained with")
    return saved_tokenizer(start.tokenizer, data)


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
    other = next((token for token, index in theirs.items() if ids.get(token, index) != index), None)
    missing = sum(token not in ids for token in theirs)
    if other is not None or missing > len(theirs) // 2:
        reason = f"it has another id for {other!r}" if other is not None else f"it lacks {missing:,} of its tokens"
        raise ConfigError(
            f"data.tokenizer is not the tokenizer of {start.name}, which the run starts from ({reason}): take that one "
            "with data/tokenizer=inherited"
        )
