"""Problems with a right answer: multiple choice by likelihood, and checking generated answers."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from pretune.data.formats.segments import Segment

LETTERS = string.ascii_lowercase
"""Of options, in their order; later ones have none."""


@dataclass(frozen=True)
class Problem:
    """A multiple-choice problem; each option continues the prompt exactly as an answer does in training."""

    prompt: str
    options: tuple[str, ...]
    correct: int
    closing: str | None
    """The text that follows the answer in training; None if the document ends with the answer."""


@dataclass(frozen=True)
class Question:
    """A problem with one right answer: a number, or one of several options."""

    prompt: list[Segment]
    wanted: str
    options: tuple[str, ...]

    def answer_in(self, text: str) -> str | None:
        """The answer in a text: a number, or an option as written in the problem; None if there is none."""
        if not self.options:
            return final_answer(text)
        place = chosen_option(text, self.options)
        return None if place is None else self.options[place]

    def is_right(self, answer: str | None) -> bool:
        if answer is None:
            return False
        return _bare(answer) == _bare(self.wanted) or (not self.options and _number(answer) == _number(self.wanted))


def final_answer(text: str) -> str | None:
    """The number of the first line `#### ...` that has one, in plain digits ("-1028.50", "1/3"), or None.

    A model that does not stop goes on with problems of its own, which are no part of the answer: neither are lines
    that come later, nor whatever follows another "Question:". The number may have a currency, thousands separators, a
    unit or a percent sign after it, and be marked up: `**28**`, `\\boxed{28}`, `= $1,028.00`, `28 dollars`.
    """
    text = re.split(r"^\s*Question:", text, maxsplit=1, flags=re.MULTILINE)[0]
    for said in text.split("####")[1:]:
        line = next((line for line in said.splitlines() if line.strip(" #")), "")
        if (number := _stated_number(line)) is not None:
            return number
    return None


def _stated_number(line: str) -> str | None:
    """The number that a line consists of, beside marks before it and any text after it; None if there is none."""
    line = re.sub(r"\\[dt]?frac\s*{(\d+)}\s*{(\d+)}", r"\1/\2", line)
    line = line.replace("{,}", ",").replace("\N{MINUS SIGN}", "-")
    line = re.sub(r"\\[a-zA-Z]+\s*|\\[,;! ]|(?<!\d)\*+|\*+(?![\d*])|[_`{}\\]", "", line)  # LaTeX and Markdown
    line = re.sub(r"^.*=", "", line)
    line = re.sub(r"^\W*(?:the )?(?:final )?answer(?: is)?\b", "", line, flags=re.IGNORECASE)
    found = _STATED.match(line)
    return found and found["sign"] + re.sub(r"[,\s]", "", found["number"])


_STATED = re.compile(
    r"[^\w.-]*(?P<sign>-?)[^\w.-]*"  # a minus stands before or after a currency
    r"(?P<number>(?:\d{1,3}(?:,\d{2,3})*,\d{3}|\d+)(?:\.\d+)?(?:/\d+)?|\.\d+)"
    r"(?!\d|[.,]\d|\s*[-+*\u00d7^/:]\s*\d|\s+\d+/\d)"  # no list, range, ratio, mixed number or sum to do
)


def chosen_option(text: str, options: Sequence[str]) -> int | None:
    """The index of the option that a text answers a multiple-choice problem with, or None.

    It reads the line after the last "answer :", or else the first line. That line means the option with the same text,
    ignoring spaces, case and thousands separators; else the option whose letter it gives ("b", "( b )", "b ) 12");
    else, if it has a single number, the only option with that number.
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
    """Normalize an answer for comparison: no spaces, thousands separators, capitals or final full stop."""
    squeezed = re.sub(r"\s+", "", text.lower())
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", squeezed).rstrip(".")


_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:/\d+)?|-?\.\d+")


def _numbers(text: str) -> list[Fraction]:
    return [number for found in _NUMBER.findall(_bare(text)) if (number := _number(found)) is not None]


def _number(text: str) -> Fraction | None:
    """The exact value of a number: 18.00 equals 18, and 1/3 is not rounded."""
    try:
        return Fraction(_bare(text).lstrip("$"))
    except (ValueError, ZeroDivisionError):
        return None
