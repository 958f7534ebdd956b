"""A long text with something in it that its end asks for."""

from __future__ import annotations

from collections.abc import Sequence

from pretune.data.formats.formatter import Formatter, last_message
from pretune.data.formats.messages import Message
from pretune.data.formats.segments import Absent, Filler, Place, Segment
from pretune.data.sources.rows import Row


class LongTask(Formatter):
    """Text that fills the prompt up to its length in tokens, with what is asked for in its place; question; answer."""

    columns = frozenset({"pieces", "needles", "question", "answer", "length", "depth"})

    def documents(self, row: Row, place: Place) -> list[list[Segment]]:
        return [[*self.prompt(row, place), Segment(row["answer"], True)]]

    def prompt(self, row: Row, place: Place) -> list[Segment]:
        if missing := sorted(self.columns - row.keys()):
            raise Absent(
                f"it has no {missing[0]}",
                lambda: f"{place}: data.format.kind = long_task reads rows of data.source.kind = long_task alone",
            )
        pieces = [
            Segment(piece["text"], False)
            if piece["share"] is None
            else Filler(piece["text"], False, length=row["length"], share=piece["share"])
            for piece in row["pieces"]
        ]
        return [*pieces, Segment(row["question"], False)]

    def render_prompt(self, messages: Sequence[Message]) -> list[Segment]:
        return [Segment(str(last_message(messages)["content"]).rstrip(" "), False)]
