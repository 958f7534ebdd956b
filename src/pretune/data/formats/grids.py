"""Tasks of grids: reading and checking them, and grids as text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pretune.core.config import InputError
from pretune.data.formats.fields import is_missing, no_field, parsed
from pretune.data.formats.grid_config import GridConfig
from pretune.data.formats.segments import Absent, Place, Unusable
from pretune.data.sources.rows import Row

Grid = tuple[tuple[int, ...], ...]
"""Rows of colours from 0 to 9."""

LARGEST = 30
"""Rows and columns that a grid has at most in ARC."""

_FENCE = "```"


@dataclass(frozen=True)
class Pair:
    """An input and its output, which a test may lack."""

    input: Grid
    output: Grid | None


@dataclass(frozen=True)
class GridTask:
    """Pairs that show a rule, and tests to apply it to."""

    name: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]


def read_task(row: Row, place: Place) -> GridTask:
    """The task of a row {id, train, test}, checked.

    Raises Unusable for a row without pairs (Absent if it has no such column), InputError for grids that are none, with
    the task, the pair and what is wrong.
    """
    name = str(row["id"]) if not is_missing(row.get("id")) else f"in row {place.row + 1}"
    return GridTask(name, _pairs(row, "train", name, place, True), _pairs(row, "test", name, place, False))


def _pairs(row: Row, side: str, name: str, place: Place, complete: bool) -> tuple[Pair, ...]:
    if side not in row:
        raise Absent(f"it has no {side}", lambda: no_field(row, side, place))
    found = [] if is_missing(row[side]) else parsed(row[side], f"field '{side}'", place)
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise InputError(f"{place}: field '{side}' is no list of pairs but {type(found).__name__}")
    if not found:
        raise Unusable(f"it has no pairs in {side}")
    return tuple(
        _pair(pair, f"{place}: task {name}, {side} pair {number}", complete)
        for number, pair in enumerate(found, start=1)
    )


def _pair(value: Any, where: str, complete: bool) -> Pair:
    if not isinstance(value, Mapping) or is_missing(value.get("input")):
        raise InputError(f"{where}: it has no input; a pair is {{input, output}}")
    output = value.get("output")
    if is_missing(output):
        if complete:
            raise InputError(f"{where}: it has no output; only a test may lack it")
        return Pair(checked(value["input"], f"{where}, input"), None)
    return Pair(checked(value["input"], f"{where}, input"), checked(output, f"{where}, output"))


def checked(value: Any, where: str) -> Grid:
    """A grid from lists of numbers; InputError, which begins with `where`, for anything else."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise InputError(f"{where}: it is no grid, which is a list of rows")
    for number, row in enumerate(value, start=1):
        if not isinstance(row, Sequence) or isinstance(row, str) or not row:
            raise InputError(f"{where}: row {number} is no list of numbers")
        if len(row) != len(value[0]):
            raise InputError(f"{where}: row {number} has {len(row)} cells, and the first has {len(value[0])}")
        for cell in row:
            if isinstance(cell, bool) or not isinstance(cell, int | float) or cell not in range(10):
                raise InputError(f"{where}: row {number} has the cell {cell!r}; colours are the numbers from 0 to 9")
    return tuple(tuple(int(cell) for cell in row) for row in value)


class GridText:
    """Grids as text, and texts as grids."""

    def __init__(self, config: GridConfig) -> None:
        self._config = config

    def write(self, grid: Grid) -> str:
        """The text of a grid, without a line break at its end."""
        config = self._config
        lines = [config.separator.join(map(str, row)) for row in grid]
        if config.row_numbers:
            lines = [f"{number} {line}" for number, line in enumerate(lines, start=1)]
        shape = f"shape: {len(grid)}x{len(grid[0])}" if config.shape else ""
        if config.fence:
            return "\n".join([f"{_FENCE}grid {shape}".rstrip(), *lines, _FENCE])
        return "\n".join([shape, *lines] if shape else lines)

    def read(self, text: str) -> Grid | None:
        """The grid in a generated text: in its first fence, or up to its first empty line; None for what is no grid.

        A shape that the text states is not compared: the rows are the answer.
        """
        lines = [line.strip() for line in text.strip().splitlines()]
        if self._config.fence:
            begin = next((number for number, line in enumerate(lines) if line.startswith(_FENCE)), None)
            if begin is None:
                return None
            lines = lines[begin + 1 :]
            end = next((number for number, line in enumerate(lines) if line.startswith(_FENCE)), None)
            if end is None:
                return None
        else:
            if lines and self._config.shape and re.fullmatch(r"shape: \d+x\d+", lines[0]):
                del lines[0]
            end = next((number for number, line in enumerate(lines) if not line), len(lines))
        rows = [self._row(number, line) for number, line in enumerate(lines[:end], start=1)]
        if not rows or len(rows) > LARGEST:
            return None
        found = tuple(row for row in rows if row is not None and len(row) == len(rows[0] or ()))
        return found if len(found) == len(rows) else None

    def _row(self, number: int, line: str) -> tuple[int, ...] | None:
        if self._config.row_numbers:
            before, _, line = line.partition(" ")
            if before != str(number):
                return None
        separator = self._config.separator
        cells = line.split(separator) if separator else list(line)
        if not 0 < len(cells) <= LARGEST or any(cell not in _DIGITS for cell in cells):
            return None
        return tuple(map(int, cells))


_DIGITS = frozenset("0123456789")
