"""Let values on the command line be what they look like, where Hydra's grammar would refuse or reread them.

Hydra parses `key=value` by a grammar of its own: `café` and `it's` are errors in it, `42` is a number even for a key
that holds text, and a comma starts a sweep. Quoted values pass through it unchanged.
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Sequence
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from pretune.core.config import ConfigError, field_paths
from pretune.launch.groups import is_group, options


def readable(overrides: Sequence[str], sweep: bool) -> list[str]:
    """The overrides with quotes where Hydra needs them; `sweep`: commas separate the values of a sweep.

    Raises ConfigError for a group without an option.
    """
    return [_readable(word, sweep) for word in overrides]


def quoted(text: str) -> str:
    """A text as a value that Hydra reads as exactly this text (it still resolves interpolations)."""
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def _readable(word: str, sweep: bool) -> str:
    name, has_value, value = word.partition("=")
    key = name.lstrip("+")
    if not has_value or name.startswith("~"):
        return word
    parsed = _parsed(word)
    if is_group(key):
        if parsed is not None and parsed.value() is None:
            raise ConfigError(f"{key}=null leaves {key} without an option; choose one of {', '.join(options(key))}")
        return word
    if parsed is not None and sweep and parsed.is_sweep_override():
        return word
    if key in _text_keys():
        meant = parsed is not None and (parsed._value is None or isinstance(parsed._value, QuotedString))
        return word if meant or (parsed is not None and "${" in value) else f"{name}={quoted(value)}"
    return word if parsed is not None else f"{name}={_from_yaml(value)}"


def _parsed(word: str) -> Override | None:
    try:
        (parsed,) = OverridesParser.create().parse_overrides([word])
    except HydraException:
        return None
    return parsed


def _from_yaml(value: str) -> str:
    """A list, mapping or text that Hydra's grammar refuses, read as YAML and with every text in quotes."""
    try:
        return _written(yaml.safe_load(value))
    except (yaml.YAMLError, ValueError, RecursionError):
        return value


def _written(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, bool | None):
        return {True: "true", False: "false", None: "null"}[value]
    return str(value) if isinstance(value, int | float) else quoted(str(value))


@functools.cache
def _text_keys() -> frozenset[str]:
    """The keys that hold any text."""
    from pretune.run.config import RunConfig

    paths = list(field_paths(RunConfig))
    others = {path for path, field in paths if not _is_text(field.annotation)}
    return frozenset(path for path, _ in paths) - others


def _is_text(annotation: Any) -> bool:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return all(_is_text(one) or one is type(None) for one in typing.get_args(annotation))
    if typing.get_origin(annotation) is typing.Annotated:
        return _is_text(typing.get_args(annotation)[0])
    return annotation is str
