"""MathQA: problems with five options and perhaps a rationale. Without options, a document is "{Problem} {answer}"."""

from __future__ import annotations

import re

from pretune.data.formats.fields import field, no_field, optional
from pretune.data.formats.formatter import PlainFormatter
from pretune.data.formats.problem_config import MathQAFormat
from pretune.data.formats.problems import LETTERS, Problem, Question
from pretune.data.formats.segments import Absent, Place, Segment, Unusable
from pretune.data.sources.rows import Row

_LETTERS = LETTERS[:5]
_RATIONALE = "\nrationale :"


class MathQA(PlainFormatter):
    """Rows of Problem, Rationale, options and correct."""

    columns = frozenset({"Problem", "Rationale", "options", "correct"})

    def __init__(self, config: MathQAFormat) -> None:
        self._config = config

    def documents(self, row: Row, place: Place) -> list[list[Segment]]:
        options, correct = options_of(row, place)
        prompt = Segment(self.prompt_text(row, place), self._config.score_prompt)
        answer = Segment(_answer(options[correct]), True)
        rationale = "" if self._config.rationale == "none" else _rationale(row, place)
        if not rationale:
            return [[prompt, answer]]
        if self._config.rationale == "after":
            return [[prompt, answer, Segment(f"{_RATIONALE} {rationale}", True)]]
        return [[prompt, Segment(f"{_RATIONALE} {rationale}\nanswer :", True), answer]]

    def prompt_text(self, row: Row, place: Place) -> str:
        problem = field(row, "Problem", place).strip()
        if not self._config.options:
            return problem
        options, _ = options_of(row, place)
        listed = " , ".join(f"{letter} ) {option}" for letter, option in zip(_LETTERS, options, strict=True))
        asked = "" if self._config.rationale == "before" else "\nanswer :"
        return f"{problem}\noptions : {listed}{asked}"

    def problem(self, row: Row, place: Place) -> Problem:
        if not self._config.has_options:
            return super().problem(row, place)
        options, correct = options_of(row, place)
        has_rationale = self._config.rationale == "after" and _rationale(row, place)
        answers = tuple(_answer(option) for option in options)
        return Problem(self.prompt_text(row, place), answers, correct, _RATIONALE if has_rationale else None)

    def question(self, row: Row, place: Place) -> Question:
        self.documents(row, place)  # raises Unusable for rows that training leaves out
        options, correct = options_of(row, place)
        return Question(self.prompt(row, place), options[correct], options)


def _answer(option: str) -> str:
    return f" {option}"


def _rationale(row: Row, place: Place) -> str:
    if "Rationale" not in row:
        raise Absent("it has no Rationale", lambda: no_field(row, "Rationale", place))
    text = optional(row, "Rationale", place).strip()
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] == '"' else text


def options_of(row: Row, place: Place) -> tuple[tuple[str, ...], int]:
    """The five options of a row and the index of the right one; raises Unusable if they cannot be parsed."""
    options = parse_options(field(row, "options", place))
    correct = field(row, "correct", place).strip().lower()
    if len(options) != 5:
        raise Unusable("it does not have five options")
    if correct not in options:
        raise Unusable("the letter of its right option is not one of a to e")
    return tuple(options[letter] for letter in _LETTERS), _LETTERS.index(correct)


_LIST_ITEM = re.compile(r"""\s*['"]\s*,\s*['"]\s*""")


_DOUBLED = re.compile(r"^[a-eA-E]\s*\)\s*(?=[^\s,])")


def parse_options(text: str) -> dict[str, str]:
    """Parse a MathQA `options` field, such as "a ) rs . 1,500 , b ) ( 3 , 4 ) , ...", into letter -> text.

    A letter counts only at the start or after a comma, and in alphabetical order, so that commas and brackets inside an
    option stay intact. A letter repeated in the text ("a ) a ) 5") is dropped. Letters that are missing, or have no
    text, are missing from the result. Lists in Python syntax ("['a ) 1', 'b ) 2']") are parsed too.
    """
    text = text.strip()
    if text.startswith("[") and text.endswith("]") and re.match(r"\[\s*['\"]?\s*[a-eA-E]\s*\)", text):
        text = _LIST_ITEM.sub(" , ", text[1:-1].strip()).strip("'\" ")
    marks: list[tuple[str, int, int]] = []
    at = 0
    for letter in _LETTERS:
        if mark := _mark(text, letter, at):
            marks.append((letter, mark.start(), mark.end()))
            at = mark.end()
    ends = [start for _, start, _ in marks[1:]] + [len(text)]
    options = {letter: text[begin:end].strip(" ,") for (letter, _, begin), end in zip(marks, ends, strict=False)}
    options = {letter: _DOUBLED.sub("", option) for letter, option in options.items()}
    return {letter: option for letter, option in options.items() if option}


def _mark(text: str, letter: str, start: int) -> re.Match[str] | None:
    """Where a letter's option begins; skips matches inside an open bracket, as in "( 3 , b )"."""
    for mark in re.compile(rf"(?:^|,)\s*\(?\s*{letter}\s*\)", re.IGNORECASE).finditer(text, start):
        before = text[start : mark.start()]
        if before.count("(") <= before.count(")"):
            return mark
    return None
