"""Multiple choice in any form that data sets have: the choices in one column or in several, any number of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pretune.core.config import InputError
from pretune.data.formats.fields import as_text, field, is_missing, parsed
from pretune.data.formats.formatter import PlainFormatter
from pretune.data.formats.problem_config import MultipleChoiceFormat
from pretune.data.formats.problems import LETTERS, Problem, Question
from pretune.data.formats.segments import Place, Unusable
from pretune.data.sources.rows import Row

_LETTERS = LETTERS.upper()


class Choice(NamedTuple):
    """The text of a choice, and its label in the data, if it has one."""

    text: str
    label: str | None


class MultipleChoice(PlainFormatter):
    """A question, and the right one of its choices: by its text, or by its letter in the prompt."""

    def __init__(self, config: MultipleChoiceFormat) -> None:
        self._config, self.score_prompt = config, config.score_prompt
        self.columns = frozenset({config.question, *config.choices, config.answer})

    def prompt_text(self, row: Row, place: Place) -> str:
        choices = self._choices(row, place) if self._config.lists_choices else ()
        return self._asked(field(row, self._config.question, place), choices)

    def answer(self, row: Row, place: Place) -> str:
        choices = self._choices(row, place)
        return self._reply(choices, self._right(row, choices, place))

    def ask(self, question: str) -> str:
        """The prompt for a question that has its choices, if any, in its text."""
        return self._config.template.replace("{choices}", "").replace("{question}", question.strip())

    def problem(self, row: Row, place: Place) -> Problem:
        choices = self._choices(row, place)
        replies = tuple(self._reply(choices, number) for number in range(len(choices)))
        return Problem(self.prompt_text(row, place), replies, self._right(row, choices, place), None)

    def question(self, row: Row, place: Place) -> Question:
        choices = self._choices(row, place)
        right = choices[self._right(row, choices, place)].text
        return Question(self.prompt(row, place), right, tuple(choice.text for choice in choices))

    def _asked(self, question: str, choices: Sequence[Choice]) -> str:
        before, _, after = self._config.template.partition("{question}")
        listed = "".join(f"{letter}. {one.text}\n" for letter, one in zip(_LETTERS, choices, strict=False))
        # The question is put in last: it may spell {choices}.
        return (before.replace("{choices}", listed) + question.strip() + after.replace("{choices}", listed)).rstrip(" ")

    def _reply(self, choices: Sequence[Choice], number: int) -> str:
        return f" {_LETTERS[number] if self._config.reply == 'letter' else choices[number].text}"

    def _choices(self, row: Row, place: Place) -> list[Choice]:
        names = self._config.choices
        if len(names) == 1:
            field_value = row.get(names[0])
            if is_missing(field_value) or field_value == "":
                field(row, names[0], place)  # raises as for any other column
            choices = list(_listed(field_value, names[0], place))
        else:
            choices = [Choice(field(row, name, place).strip(), None) for name in names]
        if len(choices) < 2:
            raise Unusable("it has fewer than two choices")
        if any(not choice.text for choice in choices):
            raise Unusable("one of its choices is empty")
        if self._config.lists_choices and len(choices) > len(_LETTERS):
            raise Unusable(f"it has more than {len(_LETTERS)} choices, and there are no more letters")
        return choices

    def _right(self, row: Row, choices: Sequence[Choice], place: Place) -> int:
        """The index of the right choice; Unusable if the column names none."""
        said = field(row, self._config.answer, place).strip()
        match self._config.answer_is:
            case "index_from_0" | "index_from_1" as base:
                found = _index(said, self._config.answer, place) - (base == "index_from_1")
            case "letter":
                found = _LETTERS.find(said.upper()) if len(said) == 1 else -1
            case "label":
                found = next((number for number, one in enumerate(choices) if one.label == said), -1)
            case "text":
                found = next((number for number, one in enumerate(choices) if one.text == said), -1)
        if not 0 <= found < len(choices):
            raise Unusable(f"its {self._config.answer} is none of its choices")
        return found


def _index(text: str, column: str, place: Place) -> int:
    try:
        number = float(text)  # a table with a gap has 1.0 for 1
    except ValueError:
        raise InputError(
            f"{place}: field '{column}' is no number ({text[:30]!r}); set data.format.answer_is to letter, label or "
            "text"
        ) from None
    if not number.is_integer():
        raise Unusable(f"its {column} is no whole number")
    return int(number)


def _listed(value: Any, column: str, place: Place) -> Iterator[Choice]:
    """The choices of one column; InputError for what is no list of them."""
    what = f"field '{column}'"
    found = parsed(value, what, place)
    if isinstance(found, Mapping) and isinstance(found.get("text"), Sequence) and not isinstance(found["text"], str):
        labels = found.get("label") or [None] * len(found["text"])
        if len(labels) != len(found["text"]):
            raise InputError(f"{place}: {what} has {len(found['text'])} texts, but {len(labels)} labels")
        found = [{"text": text, "label": label} for text, label in zip(found["text"], labels, strict=True)]
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise InputError(
            f"{place}: {what} is no list of choices, and no record with the list text, but {type(found).__name__}; for "
            "choices in several columns, name them all in data.format.choices"
        )
    for one in found:
        text, label = (one.get("text"), one.get("label")) if isinstance(one, Mapping) else (one, None)
        if is_missing(text):
            raise Unusable("one of its choices is empty")
        known = None if is_missing(label) else as_text(label, f"a label in {what}", place).strip()
        yield Choice(as_text(text, f"a choice in {what}", place).strip(), known)
