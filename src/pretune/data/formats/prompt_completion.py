"""One column with the prompt and one with its completion."""

from __future__ import annotations

from collections.abc import Sequence

from pretune.data.formats.config import PromptCompletionFormat
from pretune.data.formats.conversations import Message
from pretune.data.formats.formatter import PlainFormatter, field, filled, single_turn
from pretune.data.formats.segments import Place
from pretune.data.sources.rows import Row


class PromptCompletion(PlainFormatter):
    """The two columns joined; trailing spaces of the prompt are moved to the completion."""

    def __init__(self, config: PromptCompletionFormat) -> None:
        self.score_prompt, self._prompt, self._completion = config.score_prompt, config.prompt, config.completion

    def prompt_text(self, row: Row, place: Place) -> str:
        return field(row, self._prompt, place).rstrip(" ")

    def answer(self, row: Row, place: Place) -> str:
        prompt = field(row, self._prompt, place)
        return prompt[len(prompt.rstrip(" ")) :] + filled(row, self._completion, place)

    def as_row(self, messages: Sequence[Message]) -> Row:
        question, answer = single_turn(messages)
        return {self._prompt: question, self._completion: answer}
