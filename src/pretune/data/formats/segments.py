"""Segments of text, each scored or not; and the place of a row, for error messages."""

from __future__ import annotations

from dataclasses import dataclass

from pretune.data.sources.config import SourceConfig
from pretune.data.sources.rows import locate


@dataclass(frozen=True)
class Segment:
    """A piece of text whose tokens are either all scored or all not scored."""

    text: str
    scored: bool
    special: bool = False
    """Whether a chat template wrote it, so that text that spells a special token becomes that token."""


@dataclass(frozen=True)
class Place:
    """Where a row is, for error messages; for files, the file and the row in it."""

    source: SourceConfig
    row: int

    def __str__(self) -> str:
        return locate(self.source, self.row)


class Unusable(Exception):
    """Raised for a row that a format leaves out; the message is a generic reason, so that equal ones can be counted."""
