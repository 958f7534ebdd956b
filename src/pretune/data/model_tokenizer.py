"""Read a tokenizer from its files: its own tokenizer.json, or what lies beside the weights of a model.

tokenizer.json is read as it stands. Classes of transformers that build a tokenizer anew from its vocabulary drop steps
that the model was pretrained with, such as the single digits of SmolLM's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretune.core.config import ConfigError, InputError
from pretune.core.quiet import quiet
from pretune.data.sources.hub import error_summary
from pretune.data.tokenizer_files import (
    ABOUT,
    END_IDS,
    SEAL,
    TEMPLATE_FROM,
    TOKENIZER,
    added_ids,
    is_as_sealed,
    read_keys,
    saved_template,
    token,
)

if TYPE_CHECKING:
    import tokenizers

GENERATION, CONFIG, SPECIAL, ADDED = (
    "generation_config.json",
    "config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_VOCABULARIES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model")
"""Vocabularies that transformers may know how to convert."""

_NO_LIMIT = 10**9
"""A model_max_length from here on, often 1e30, says that there is none."""


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files of a tokenizer say. `end_ids`: the tokens that end a text besides `eos`; `max_length`: the number
    of tokens that its model was made for, or None; `template_from`: see TemplateTokens; `added_ids`: the tokens that
    the run appended whose tokenizer it is."""

    backend: tokenizers.Tokenizer
    eos: str
    bos: str
    template: str | None
    end_ids: tuple[int, ...]
    max_length: int | None
    template_from: str | None
    added_ids: tuple[int, ...]


def read_tokenizer(path: str | Path, eos: str | None) -> TokenizerFiles:
    """The tokenizer at `path`: a tokenizer.json, or a folder with one or with another vocabulary that transformers
    converts without a model's own code. `eos`, if not None, is taken instead of what the files say. A tokenizer.json
    that is named itself is no model's, so its `end_ids` are empty.

    Raises InputError for files that are not there, damaged or cannot be converted, ConfigError if nothing says what
    EOS is.
    """
    found = Path(path).expanduser()
    if not found.is_file() and not any((found / name).is_file() for name in (TOKENIZER, *_VOCABULARIES)):
        raise InputError(f"no tokenizer at '{path}': expected a tokenizer.json, or a folder that contains one")
    folder = found.parent if found.is_file() else found
    about = read_keys(folder / ABOUT)
    if not is_as_sealed(folder, about):
        raise InputError(
            f"the tokenizer in {folder} is damaged: its files are not what was written; restore them from a copy "
            f"or, if you meant to change them, delete {SEAL} from {ABOUT}"
        )
    backend = _backend(found if found.is_file() else found / TOKENIZER)
    _add_tokens(backend, about, folder)
    special = read_keys(folder / SPECIAL)
    ids = _end_ids(folder, about, backend)
    eos = (
        eos
        or token(about, "eos_token")
        or token(special, "eos_token")
        or (backend.id_to_token(ids[0]) if ids else None)
    )
    if eos is None:
        raise ConfigError(
            f"data.tokenizer.eos is null and neither {folder / ABOUT} nor {GENERATION} or {CONFIG} beside it say it; "
            "set it to the token's text"
        )
    bos, template = token(about, "bos_token") or token(special, "bos_token") or "", saved_template(folder, about)
    ids = ids if found.is_dir() else ()
    length, template_from = _max_length(about), about.get(TEMPLATE_FROM)
    return TokenizerFiles(backend, eos, bos, template, ids, length, template_from, added_ids(folder))


def _backend(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    if not path.is_file():
        return _converted(path.parent)
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises plain Exception
        raise InputError(f"{path} is not a tokenizer.json: {error_summary(error)}") from error


def _converted(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer that transformers makes of another vocabulary, which may add a BOS as its settings say."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            found: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return found.backend_tokenizer
    except Exception as error:  # conversion raises whatever the libraries of each vocabulary do
        needs_more = any(folder.glob("*.model")) and importlib.util.find_spec("sentencepiece") is None
        why = "for a .model it needs the package sentencepiece" if needs_more else error_summary(error)
        raise InputError(
            f"{folder} has no {TOKENIZER}, and transformers cannot convert the vocabulary there ({why}); where it can "
            "be loaded, write one with AutoTokenizer.from_pretrained(...).save_pretrained(...), and put it there"
        ) from error


def _add_tokens(backend: tokenizers.Tokenizer, about: Mapping[str, Any], folder: Path) -> None:
    """Add the tokens that only the files beside tokenizer.json have, with the ids that they have there."""
    from tokenizers import AddedToken

    try:
        given = {int(index): dict(one) for index, one in (about.get("added_tokens_decoder") or {}).items()}
        for text, index in read_keys(folder / ADDED).items():
            given.setdefault(int(index), {"content": text, "special": False})
        tokens = {index: AddedToken(**{key: one[key] for key in _FLAGS if key in one}) for index, one in given.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"cannot read the added tokens in {folder / ABOUT} or {ADDED} ({error}); restore them"
        ) from None
    for index, one in sorted(tokens.items()):
        if backend.token_to_id(one.content) is not None:
            continue
        backend.add_tokens([one])
        if backend.token_to_id(one.content) != index:
            raise InputError(
                f"the files in {folder} disagree: token '{one.content}' is {index} beside {TOKENIZER}, where "
                f"{backend.token_to_id(one.content)} would be its number; restore the model's own files"
            )


_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def _end_ids(folder: Path, about: Mapping[str, Any], backend: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The tokens that end a text, as generation_config.json says, or config.json; those of a tokenizer that Pretune
    wrote are with it. A padded table has rows for ids that no token has: they are left out."""
    places = [(folder / ABOUT, about.get(END_IDS))] if END_IDS in about else []
    if not places:
        content = read_keys(folder / CONFIG)
        inner = content.get("text_config")
        content = inner if "eos_token_id" not in content and isinstance(inner, dict) else content
        generation = read_keys(folder / GENERATION)
        places = [(folder / GENERATION, generation.get("eos_token_id")), (folder / CONFIG, content.get("eos_token_id"))]
    path, value = next(((path, value) for path, value in places if value is not None), (folder, []))
    ids = value if isinstance(value, list) else [value]
    if any(not isinstance(one, int) or isinstance(one, bool) or one < 0 for one in ids):
        raise InputError(f"{path}: its end tokens are {value!r}, which is neither an id nor a list of them; correct it")
    return tuple(dict.fromkeys(one for one in ids if one < 2**32 and backend.id_to_token(one) is not None))


def _max_length(about: Mapping[str, Any]) -> int | None:
    value = about.get("model_max_length")
    return int(value) if isinstance(value, int | float) and 1 < value < _NO_LIMIT else None
