"""GSM8K: grade-school math problems with a worked solution that ends in the result."""

from __future__ import annotations

import re

from pretune.data.formats.fields import field
from pretune.data.formats.formatter import PlainFormatter
from pretune.data.formats.problem_config import GSM8KFormat
from pretune.data.formats.problems import Question, final_answer
from pretune.data.formats.segments import Place, Unusable
from pretune.data.sources.rows import Row

_CALCULATION = re.compile(r"<<[^<>]*>>")


class GSM8K(PlainFormatter):
    """Rows of question and answer, whose last line is `#### number`."""

    columns = frozenset({"question", "answer"})

    def __init__(self, config: GSM8KFormat) -> None:
        self.score_prompt, self._calculations = config.score_prompt, config.calculations

    def prompt_text(self, row: Row, place: Place) -> str:
        return self.ask(field(row, "question", place))

    def answer(self, row: Row, place: Place) -> str:
        answer = field(row, "answer", place).strip()
        if final_answer(answer) is None:
            raise Unusable("its answer has no line '#### number'")
        return " " + (answer if self._calculations else _CALCULATION.sub("", answer))

    def ask(self, question: str) -> str:
        return f"Question: {question.strip()}\nAnswer:"

    def question(self, row: Row, place: Place) -> Question:
        wanted = final_answer(self.answer(row, place))
        assert wanted is not None  # `answer` raises Unusable for such rows
        return Question(self.prompt(row, place), wanted, ())
