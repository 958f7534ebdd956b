"""Plain text: one column, in which everything is scored."""

from __future__ import annotations

from pretune.data.formats.config import TextFormat
from pretune.data.formats.fields import field
from pretune.data.formats.formatter import PlainFormatter
from pretune.data.formats.segments import Place, Segment, Unusable
from pretune.data.formats.special_tokens import TemplateTokens, without_eos
from pretune.data.sources.rows import Row


class Text(PlainFormatter):
    """A document is the text of the column; a prompt is the beginning of such a text."""

    def __init__(self, config: TextFormat, tokens: TemplateTokens) -> None:
        self._column, self._tokens, self.special = config.column, tokens, config.parse_special
        self.columns = frozenset({config.column})

    def documents(self, row: Row, place: Place) -> list[list[Segment]]:
        text = field(row, self._column, place)
        if self.special:
            text = without_eos(text, self._tokens)
            if not text.strip():
                raise Unusable(f"its {self._column} is empty")
        return [[Segment(text, True, self.special)]]

    def prompt_text(self, row: Row, place: Place) -> str:
        return field(row, self._column, place)
