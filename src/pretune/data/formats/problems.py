"""Problems with a right answer: multiple choice by likelihood, and answers that a model writes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from pretune.data.formats.segments import Segment

LETTERS = "abcde"


@dataclass(frozen=True)
class Problem:
    """A multiple-choice problem: each option continues the prompt exactly as an answer does in training."""

    prompt: str
    options: tuple[str, ...]
    correct: int
    closing: str | None
    """What follows the answer in training; None: the document ends with it."""


@dataclass(frozen=True)
class Question:
    """A problem with one right answer: a number, or one of several options."""

    prompt: list[Segment]
    wanted: str
    options: tuple[str, ...]

    def answer_in(self, text: str) -> str | None:
        """What a text answers: a number, or an option as it is written in the problem; None for nothing of the kind."""
        if not self.options:
            return final_answer(text)
        place = chosen_option(text, self.options)
        return None if place is None else self.options[place]

    def is_right(self, answer: str | None) -> bool:
        if answer is None:
            return False
        return _bare(answer) == _bare(self.wanted) or (not self.options and _number(answer) == _number(self.wanted))


def final_answer(text: str) -> str | None:
    """The number after the last `####`, without dollar sign and thousands separators, or None."""
    found = _FINAL_ANSWER.findall(text)
    return found[-1].replace(",", "") if found else None


_FINAL_ANSWER = re.compile(r"####\s*\$?\s*(-?[\d,]*\.?\d+)")


def chosen_option(text: str, options: Sequence[str]) -> int | None:
    """Which option a text that answers a multiple-choice problem means, or None.

    Read is what follows the last "answer :", or else the first line. It means the option that it is, word for word
    but for spaces, case and thousands separators; else the one whose letter it gives ("b", "( b )", "b ) 12"); else the
    only one with the only number that it has.
    """
    said = re.split(r"answer\s*(?:is)?\s*:", text, flags=re.IGNORECASE)[-1].strip()
    said = said.splitlines()[0].strip() if said else ""
    bare = [_bare(option) for option in options]
    if _bare(said) in bare:
        return bare.index(_bare(said))
    letter = re.match(r"\(?\s*([a-z])\s*(?:[).:]|$)", said, re.IGNORECASE)
    if letter and letter[1].lower() in LETTERS[: len(options)]:
        return LETTERS.index(letter[1].lower())
    numbers = _numbers(said)
    if len(numbers) != 1:
        return None
    same = [place for place, option in enumerate(options) if _numbers(option) == numbers]
    return same[0] if len(same) == 1 else None


def _bare(text: str) -> str:
    """A text by which equal answers are equal: no spaces, no thousands separators, no capitals, no full stop."""
    squeezed = re.sub(r"\s+", "", text.lower())
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", squeezed).rstrip(".")


_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:/\d+)?|-?\.\d+")


def _numbers(text: str) -> list[Fraction]:
    return [number for found in _NUMBER.findall(_bare(text)) if (number := _number(found)) is not None]


def _number(text: str) -> Fraction | None:
    """Exactly what digits say: 18.00 is 18, and 1/3 is itself."""
    try:
        return Fraction(_bare(text).lstrip("$"))
    except (ValueError, ZeroDivisionError):
        return None
