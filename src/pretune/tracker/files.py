"""Rows of JSON in a run's folder: one object per line, appended as it happens."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pretune.core.config import InputError
from pretune.core.files import whole_lines, write_atomic


class JsonLines:
    """A file of JSON rows that is appended to; a row is on disk, or at least with the system, when `append` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row. Non-finite numbers become null, because JSON has no NaN."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(json_ready(row), ensure_ascii=False, allow_nan=False) + "\n"
        # One write per row, on a file opened for it, so that a signal never leaves half a row in a buffer.
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        with os.fdopen(handle, "wb", buffering=0) as file:
            data = memoryview(line.encode("utf-8", "replace"))
            while data:
                data = data[file.write(data) :]

    def recorded(self) -> dict[str, int]:
        """The number of rows and the CRC-32 of their bytes, by the name of the file."""
        lines = whole_lines(self.path)
        return {self.path.stem: len(lines), f"{self.path.stem}_crc32": zlib.crc32(b"".join(lines))}

    def holds(self, recorded: Mapping[str, int]) -> bool:
        """Whether the file begins with what was `recorded`: an earlier answer of that method, perhaps among others."""
        count, known = recorded.get(self.path.stem), recorded.get(f"{self.path.stem}_crc32")
        return known is None or known == zlib.crc32(b"".join(whole_lines(self.path)[:count]))

    def rewind(self, step: int, recorded: Mapping[str, int] | None = None) -> bool:
        """Drop the rows after `step`, those after what was `recorded`, and a last line that a crash cut short. Returns
        whether the file still held what was recorded.

        Atomically. No file, nothing to drop.
        """
        recorded = recorded or {}
        whole, count = self.holds(recorded), recorded.get(self.path.stem)
        if self.path.is_file():
            kept = [row for row in read_rows(self.path)[:count] if row["step"] <= step]
            text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in kept)
            write_atomic(self.path, text)
        return whole


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; a last line without its end (a crash while it was written) is left out.

    Raises InputError, with the number of the line, for any other line that is not a JSON object.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return list(_parse(path, lines[:-1]))


def first_value(rows: Iterable[Mapping[str, Any]], name: str) -> Any:
    """The first value of a metric, or None."""
    return next((row[name] for row in rows if row.get(name) is not None), None)


def _parse(path: Path, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number} is not JSON ({error.msg}); delete that line") from None
        if not isinstance(row, dict) or not _is_row(row):
            raise InputError(f"{path}, line {number} is not a row of a run; delete that line")
        yield row


def _is_row(row: Mapping[str, Any]) -> bool:
    """Whether it has a step, and otherwise numbers, nulls and texts."""
    step = row.get("step")
    return type(step) is int and all(value is None or type(value) in (int, float, str) for value in row.values())


def json_ready(value: Any) -> Any:
    """`value` as JSON can represent it: NaN and infinities become null, array scalars become numbers."""
    if isinstance(value, Mapping):
        return {str(key): json_ready(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(inner) for inner in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if hasattr(value, "item"):
        return json_ready(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)
