"""The keys of a config.json: typed, and each accounted for."""

from __future__ import annotations

import json
import math
from collections.abc import Container
from pathlib import Path
from typing import Any

from pretune.core.config import InputError


class NotHeld(InputError):
    """Our transformer cannot hold a model whose config.json is in order; transformers may."""


REQUIRED = object()
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", list: "a list", dict: "an object"}


class Keys:
    """What a config.json says, by key; it knows which keys were asked for."""

    def __init__(self, content: dict[str, Any], path: Path) -> None:
        self.content, self.path = content, path
        self._taken: set[str] = set()

    def take(self, key: str, kind: type, default: Any = REQUIRED, none: bool = False) -> Any:
        """The value of a key, of that type; `default` where it is left out or null (`none`: null is a value).

        Raises InputError where it is missing and has no default, or is of another type.
        """
        self._taken.add(key)
        value = self.content.get(key)
        if value is None:
            if none and key in self.content:
                return None
            if default is REQUIRED:
                raise InputError(f"{self.path} has no {key}, without which the model is not known")
            return default
        fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if not fits or (kind is not bool and isinstance(value, bool)):
            raise InputError(f"{self.path}: {key} = {json.dumps(value)} must be {_WORDS[kind]}")
        if kind is float:
            value = float(value)
            if not math.isfinite(value):
                raise InputError(f"{self.path}: {key} = {value} must be a finite number")
        return value

    def must_be(self, key: str, wanted: Any, default: Any = REQUIRED) -> None:
        """Raise InputError unless the key has that one value, the only one that can be computed."""
        found = self.take(key, type(wanted), default)
        if found != wanted:
            raise NotHeld(f"{self.path}: {key} = {json.dumps(found)} cannot be computed; {json.dumps(wanted)} can")

    def refuse_rest(self, ignored: Container[str]) -> None:
        """Raise InputError, naming it, for a key that was not asked for, has a value and is not ignored."""
        rest = [key for key, value in self.content.items() if value is not None and key not in self._taken]
        unknown = [key for key in rest if key not in ignored]
        if "quantization_config" in unknown:
            raise InputError(f"{self.path} has quantization_config: use the model's unquantized weights")
        if unknown:
            raise NotHeld(
                f"{self.path}: {', '.join(unknown[:3])} is not known for {self.content['model_type']} and may change "
                "what the model computes; remove it if you know that it does not"
            )
