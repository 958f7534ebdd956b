"""Segments of text, each scored or not; the place of a row, for error messages; and rows that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from pretune.core.config import InputError
from pretune.data.sources.config import SourceConfig
from pretune.data.sources.rows import locate


@dataclass(frozen=True)
class Segment:
    """A piece of text whose tokens are either all scored or all not scored."""

    text: str
    scored: bool
    special: bool = False
    """Whether text that spells a special token becomes that token: a chat template wrote it, or the format says so."""


@dataclass(frozen=True)
class Filler(Segment):
    """Text that fills a document up to a length in tokens: what is too much of it is left out.

    length: of the document's unscored tokens, those before a text included. share: what this filler takes of the tokens
    that the other unscored segments leave; all of a document sum to 1.
    """

    length: int = 0
    share: float = 1.0


@dataclass(frozen=True)
class Place:
    """Where a row is, or a part of it, for error messages; for files, the file and the row in it."""

    source: SourceConfig
    row: int
    part: str = ""

    def within(self, part: str) -> Place:
        """The place of a part of the row. Cheap: the row is only looked up when the place is written out."""
        return replace(self, part=part)

    def __str__(self) -> str:
        return locate(self.source, self.row) + (f", {self.part}" if self.part else "")


class Unusable(Exception):
    """Raised for a row that a format leaves out; the message is a generic reason, so that equal ones can be counted."""


class Absent(Unusable):
    """A row is left out because it does not even have the column; `explain` writes the error if no row has it."""

    def __init__(self, reason: str, explain: Callable[[], str]) -> None:
        super().__init__(reason)
        self.explain = explain


class ColumnCheck:
    """Tells a column that some rows lack from one that no row has.

    A row without the column is left out and counted, like one with null there. If that is so for every row of the
    source, or for its first 2,000, the column's name is wrong, which is an error.
    """

    _LIMIT = 2_000

    def __init__(self, passed: bool = False) -> None:
        self._passed, self._absent = passed, 0
        self._first: Absent | None = None

    def add(self, reason: Unusable | None) -> None:
        """Add the next row: why it is left out, or None. Raises InputError when the first rows all lack the column."""
        if self._passed:
            return
        if not isinstance(reason, Absent):
            self._passed = True
            return
        self._first = self._first or reason
        self._absent += 1
        if self._absent >= self._LIMIT:
            self.end()

    def end(self) -> None:
        """Raise InputError if every row lacks the column."""
        if not self._passed and self._first is not None:
            raise InputError(self._first.explain())
