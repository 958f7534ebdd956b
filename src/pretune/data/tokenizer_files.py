"""The files of a tokenizer: what transformers' tokenizer_config.json says of it, and whether they are as saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretune.core.config import InputError
from pretune.core.files import fingerprint, measure, write_json

TOKENIZER, ABOUT, CHAT_TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
SEAL, END_IDS, TEMPLATE_FROM = "pretune_seal", "pretune_end_ids", "pretune_template_from"
ADDED_IDS = "pretune_added_ids"
"""Keys of tokenizer_config.json: a fingerprint of its other keys and of the files beside it; the ids of the tokens that
end a text besides EOS, which a model's generation_config.json lists; the data.format.template that named the place of
the chat template; and the ids of the tokens that the run appended."""


def write_about(folder: Path, about: Mapping[str, Any]) -> None:
    """Write tokenizer_config.json, last of a tokenizer's files, with their fingerprint."""
    write_json(folder / ABOUT, {**about, SEAL: _seal(folder, about)})


def read_keys(path: Path) -> dict[str, Any]:
    """The content of a JSON file beside a tokenizer; empty if there is none. InputError if it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no keys")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path} ({error}); restore the tokenizer's files") from None
    return found


def is_as_sealed(folder: Path, about: Mapping[str, Any]) -> bool:
    """Whether files that Pretune wrote are what they were; True for files that it did not write. `about`: the content
    of tokenizer_config.json."""
    return SEAL not in about or about[SEAL] == _seal(folder, {key: about[key] for key in about if key != SEAL})


def is_sealed(folder: Path) -> bool:
    """Whether `folder` holds a tokenizer that Pretune wrote, all of it and unchanged."""
    try:
        about = read_keys(folder / ABOUT)
        return SEAL in about and (folder / TOKENIZER).is_file() and is_as_sealed(folder, about)
    except (InputError, OSError):
        return False


def added_ids(folder: Path) -> tuple[int, ...]:
    """The ids of the tokens that the run appended whose tokenizer is in `folder`; InputError if it cannot be read."""
    return tuple(read_keys(folder / ABOUT).get(ADDED_IDS, ()))


def token(about: Mapping[str, Any], name: str) -> str | None:
    """The text of a special token, such as `eos_token`, or None."""
    found = about.get(name)
    found = found.get("content") if isinstance(found, dict) else found  # older files store a token as a mapping
    return found if isinstance(found, str) else None


def saved_template(folder: Path, about: Mapping[str, Any]) -> str | None:
    """The chat template from its own file or from tokenizer_config.json, where it may be the default of several."""
    if (folder / CHAT_TEMPLATE).is_file():
        return (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
    template = about.get("chat_template")
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _seal(folder: Path, about: Mapping[str, Any]) -> str:
    files = (folder / TOKENIZER, folder / CHAT_TEMPLATE)
    return fingerprint([dict(about), [[path.name, measure(path)] for path in files if path.is_file()]])
