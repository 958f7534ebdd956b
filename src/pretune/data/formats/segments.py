"""What a row becomes: stretches of text, each scored or not; and how messages name a row."""

from __future__ import annotations

from dataclasses import dataclass

from pretune.data.sources.config import SourceConfig
from pretune.data.sources.rows import locate


@dataclass(frozen=True)
class Segment:
    """A stretch of text whose tokens are all scored, or all not."""

    text: str
    scored: bool
    special: bool = False
    """A chat template wrote it: special tokens that it spells are special tokens. Elsewhere they are only text."""


@dataclass(frozen=True)
class Place:
    """Where a row is, for messages about it: the file and its row where the source is files."""

    source: SourceConfig
    row: int

    def __str__(self) -> str:
        return locate(self.source, self.row)


class Unusable(Exception):
    """A row that a format leaves out; the message is the reason, without particulars, so that it can be counted."""
