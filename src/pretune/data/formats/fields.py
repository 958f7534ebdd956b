"""Read a row's fields as text. A null, a NaN and a text without characters are all nothing, in every column."""

from __future__ import annotations

import datetime
import decimal
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pretune.core.config import InputError, nearest
from pretune.data.formats.segments import Absent, Place, Unusable
from pretune.data.sources.rows import Row


def field(row: Row, name: str, place: Place) -> str:
    """A field that a row needs, as text.

    Raises Unusable if it is missing or empty (Absent if the row has no such key), InputError if it is not text.
    """
    if name not in row:
        raise Absent(f"it has no {name}", lambda: no_field(row, name, place))
    value = row[name]
    if is_missing(value):
        raise Unusable(f"it has no {name}")
    text = as_text(value, f"field '{name}'", place)
    if not text.strip():
        raise Unusable(f"its {name} is empty")
    return text


def optional(row: Row, name: str, place: Place) -> str:
    """A field that a row may lack, as text; empty if it is missing. Raises InputError if it is not text."""
    value = row.get(name)
    return "" if is_missing(value) else as_text(value, f"field '{name}'", place)


def present(row: Row, names: Iterable[str]) -> str | None:
    """The first of these columns that has something in it, or None."""
    return next((name for name in names if not is_missing(row.get(name))), None)


def is_missing(value: Any) -> bool:
    """Whether a value stands for nothing: null, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float | decimal.Decimal) and math.isnan(value))


def as_text(value: Any, what: str, place: Place) -> str:
    """A value as text: numbers, true and false as JSON writes them, dates and times in ISO 8601.

    Raises Unusable for an infinite number, which JSON cannot write; InputError for lists, records and bytes.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, float | decimal.Decimal) and not math.isfinite(value):
        raise Unusable("it has an infinite number in place of a text")
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    hint = "; data/format=chat reads lists of messages" if _is_chat(value) else ""
    raise InputError(f"{place}: {what} is not text but {type(value).__name__}{hint}")


def parsed(value: Any, what: str, place: Place) -> Any:
    """A value that may be stored as JSON text. Raises InputError for text that is not JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise InputError(f"{place}: {what} is text, but not JSON ({error})") from None


def no_field(row: Row, name: str, place: Place) -> str:
    """The error message for rows without the field `name`."""
    has = [key for key, value in row.items() if value is not None]
    return f"{place} has no field '{name}'{nearest(name, has)} (it has: {', '.join(has) or 'nothing'})"


def _is_chat(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(isinstance(item, Mapping) for item in value)
