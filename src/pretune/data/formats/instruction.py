"""Instructions and their outputs, in Alpaca's published prompts, so that results are comparable."""

from __future__ import annotations

from collections.abc import Sequence

from pretune.data.formats.config import InstructionFormat
from pretune.data.formats.conversations import Message
from pretune.data.formats.formatter import PlainFormatter, field, filled, single_turn
from pretune.data.formats.segments import Place
from pretune.data.sources.rows import Row

_PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)


class Instruction(PlainFormatter):
    """Rows of instruction, input (may be empty) and output."""

    def __init__(self, config: InstructionFormat) -> None:
        self.score_prompt, self._preamble = config.score_prompt, config.preamble

    def prompt_text(self, row: Row, place: Place) -> str:
        context = "" if row.get("input") is None else field(row, "input", place)
        return self._written(field(row, "instruction", place), context)

    def answer(self, row: Row, place: Place) -> str:
        return filled(row, "output", place)

    def ask(self, question: str) -> str:
        return self._written(question, "")

    def as_row(self, messages: Sequence[Message]) -> Row:
        question, answer = single_turn(messages)
        return {"instruction": question, "output": answer}

    def _written(self, instruction: str, context: str) -> str:
        if not context.strip():
            preamble = _PREAMBLE if self._preamble else ""
            return f"{preamble}### Instruction:\n{instruction}\n\n### Response:\n"
        preamble = _PREAMBLE_WITH_INPUT if self._preamble else ""
        return f"{preamble}### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
