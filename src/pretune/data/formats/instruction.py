"""Instructions and their outputs, in Alpaca's published prompts, so that results are comparable."""

from __future__ import annotations

from pretune.core.config import InputError
from pretune.data.formats.config import InstructionFormat
from pretune.data.formats.fields import field, is_missing, optional
from pretune.data.formats.formatter import PlainFormatter, single_turn
from pretune.data.formats.messages import Turn
from pretune.data.formats.segments import Place, Segment
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

    columns = frozenset({"instruction", "input", "output"})

    def __init__(self, config: InstructionFormat) -> None:
        self.score_prompt, self._preamble, self._refused = config.score_prompt, config.preamble, config.refuse_columns
        self.refuses_columns = bool(config.refuse_columns)

    def prompt_text(self, row: Row, place: Place) -> str:
        self._refuse(row, place)
        return self._written(field(row, "instruction", place), optional(row, "input", place))

    def answer(self, row: Row, place: Place) -> str:
        return field(row, "output", place)

    def ask(self, question: str) -> str:
        return self._written(question, "")

    def answer_documents(self, turns: list[Turn], row: Row, place: Place) -> list[list[Segment]]:
        self._refuse(row, place)
        question, answer = single_turn(turns)
        return self.documents({"instruction": question, "output": answer}, place)

    def _refuse(self, row: Row, place: Place) -> None:
        """Raise InputError for a row with a column that would be left out without a word."""
        for name in self._refused:
            value = row.get(name)
            if not is_missing(value) and value != [] and not (isinstance(value, str) and not value.strip()):
                raise InputError(
                    f"{place} has a {name}, for which Alpaca's prompt has no place; use data/format=chat (for "
                    "preferences: preference_chat), or leave it out with refuse_columns=[] in the format's section"
                )

    def _written(self, instruction: str, context: str) -> str:
        if not context.strip():
            preamble = _PREAMBLE if self._preamble else ""
            return f"{preamble}### Instruction:\n{instruction}\n\n### Response:\n"
        preamble = _PREAMBLE_WITH_INPUT if self._preamble else ""
        return f"{preamble}### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
