"""Plain text: one column, in which everything is scored."""

from __future__ import annotations

from pretune.data.formats.config import TextFormat
from pretune.data.formats.formatter import PlainFormatter, field, filled
from pretune.data.formats.segments import Place, Segment
from pretune.data.sources.rows import Row


class Text(PlainFormatter):
    """A document is the text of the column; a prompt is the beginning of such a text."""

    def __init__(self, config: TextFormat) -> None:
        self._column = config.column

    def documents(self, row: Row, place: Place) -> list[list[Segment]]:
        return [[Segment(filled(row, self._column, place), True)]]

    def prompt_text(self, row: Row, place: Place) -> str:
        return field(row, self._column, place)
