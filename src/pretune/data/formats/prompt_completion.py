"""One column with the prompt and one with its completion."""

from __future__ import annotations

from pretune.data.formats.config import PromptCompletionFormat
from pretune.data.formats.fields import field
from pretune.data.formats.formatter import PlainFormatter, single_turn
from pretune.data.formats.messages import Turn
from pretune.data.formats.segments import Place, Segment, Unusable
from pretune.data.formats.special_tokens import TemplateTokens, without_eos
from pretune.data.sources.rows import Row


class PromptCompletion(PlainFormatter):
    """The two columns joined; trailing spaces of the prompt are moved to the completion."""

    def __init__(self, config: PromptCompletionFormat, tokens: TemplateTokens) -> None:
        self.score_prompt, self._prompt, self._completion = config.score_prompt, config.prompt, config.completion
        self._tokens, self.special = tokens, config.parse_special
        self.columns = frozenset({config.prompt, config.completion})

    def prompt_text(self, row: Row, place: Place) -> str:
        return field(row, self._prompt, place).rstrip(" ")

    def answer(self, row: Row, place: Place) -> str:
        prompt, completion = field(row, self._prompt, place), field(row, self._completion, place)
        if self.special:
            completion = without_eos(completion, self._tokens)
            if not completion.strip():
                raise Unusable(f"its {self._completion} is empty")
        return prompt[len(prompt.rstrip(" ")) :] + completion

    def answer_documents(self, turns: list[Turn], row: Row, place: Place) -> list[list[Segment]]:
        question, answer = single_turn(turns)
        return self.documents({self._prompt: question, self._completion: answer}, place)
