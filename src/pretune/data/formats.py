"""How a row becomes text, and which of it is scored.

One definition of a prompt serves training and option scoring. Segments are tokenized one by one and joined, and a
prompt never ends in a space (the space belongs to the continuation), so both see the same tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pretune.config import ConfigError, InputError, nearest
from pretune.data.config import DataConfig, FormatConfig, InstructionFormat, MathQAFormat, TextFormat
from pretune.data.sources import Row, Side, describe, numbered_rows

VERSION = 1
"""Raise when the same row would give other text: prepared data is addressed by it."""

LETTERS = "abcde"


@dataclass(frozen=True)
class Segment:
    """A stretch of text whose tokens are all scored, or all not."""

    text: str
    scored: bool


@dataclass(frozen=True)
class Problem:
    """A multiple-choice problem: each option continues the prompt exactly as an answer does in training."""

    prompt: str
    options: tuple[str, ...]
    correct: int


@dataclass(frozen=True)
class Place:
    """Where a row is, for messages about it."""

    source: str
    row: int

    def __str__(self) -> str:
        return f"{self.source}, row {self.row + 1}"


class Unusable(Exception):
    """A row that a format leaves out; the message is the reason, without particulars, so that it can be counted."""


def document(format: FormatConfig, row: Row, place: Place) -> list[Segment]:
    """The segments of one row; a segment is never empty.

    Raises Unusable for a row to leave out, InputError for a row that lacks a field.
    """
    match format:
        case TextFormat():
            text = _field(row, format.column, place)
            if not text:
                raise Unusable("its text is empty")
            return [Segment(text, True)]
        case InstructionFormat():
            output = _field(row, "output", place)
            if not output.strip():
                raise Unusable("its output is empty")
            return [Segment(_instruction_prompt(row, place), format.score_prompt), Segment(output, True)]
        case MathQAFormat():
            return _mathqa_document(format, row, place)


def documents(config: DataConfig, side: Side) -> Iterator[list[Segment]]:
    """The documents of one side; rows to leave out are skipped."""
    source = described_side(config, side)
    for number, row in numbered_rows(config, side):
        try:
            yield document(config.format, row, Place(source, number))
        except Unusable:
            continue


def training_texts(config: DataConfig) -> Iterator[str]:
    """The text of every training document."""
    return ("".join(segment.text for segment in segments) for segments in documents(config, "train"))


def problems(config: DataConfig) -> Iterator[Problem]:
    """The held-out multiple-choice problems, in the order of their source.

    Raises ConfigError for a format without options, or whose answer comes after the rationale.
    """
    format = config.format
    if not isinstance(format, MathQAFormat) or format.rationale == "before":
        raise ConfigError("options can be compared for data.format.kind = mathqa with rationale none or after only")
    source = described_side(config, "validation")
    for number, row in numbered_rows(config, "validation"):
        place = Place(source, number)
        try:
            options, correct = _options(row, place)
        except Unusable:
            continue
        yield Problem(_mathqa_prompt(format, row, place), tuple(_answer(option) for option in options), correct)


def described_side(config: DataConfig, side: Side) -> str:
    """The source that a side's rows come from, as messages name it."""
    own = config.validation.source
    return describe(own if side == "validation" and own is not None else config.source)


def _field(row: Row, name: str, place: Place) -> str:
    value: Any = row.get(name)
    if isinstance(value, str):
        return value
    if value is None:
        has = [key for key, other in row.items() if other is not None]
        raise InputError(f"{place} has no field '{name}'{nearest(name, has)} (it has: {', '.join(has) or 'nothing'})")
    if isinstance(value, int | float):
        return str(value)
    raise InputError(f"{place}: field '{name}' is not text but {type(value).__name__}")


# Alpaca: the published prompts of the dataset, with which models are compared.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def _instruction_prompt(row: Row, place: Place) -> str:
    instruction = _field(row, "instruction", place)
    context = "" if row.get("input") is None else _field(row, "input", place)
    if context.strip():
        return _WITH_INPUT.format(instruction=instruction, input=context)
    return _WITHOUT_INPUT.format(instruction=instruction)


# MathQA: without options, "{Problem} {answer}" as the reference system has it.


def _mathqa_document(format: MathQAFormat, row: Row, place: Place) -> list[Segment]:
    options, correct = _options(row, place)
    prompt = Segment(_mathqa_prompt(format, row, place), format.score_prompt)
    answer = Segment(_answer(options[correct]), True)
    rationale = "" if format.rationale == "none" else _rationale(row, place)
    if not rationale:
        return [prompt, answer]
    if format.rationale == "after":
        return [prompt, answer, Segment(f"\nrationale : {rationale}", True)]
    return [prompt, Segment(f"\nrationale : {rationale}\nanswer :", True), answer]


def _mathqa_prompt(format: MathQAFormat, row: Row, place: Place) -> str:
    problem = _field(row, "Problem", place).strip()
    if not format.options:
        return problem
    options, _ = _options(row, place)
    listed = " , ".join(f"{letter} ) {option}" for letter, option in zip(LETTERS, options, strict=True))
    asked = "" if format.rationale == "before" else "\nanswer :"
    return f"{problem}\noptions : {listed}{asked}"


def _answer(option: str) -> str:
    return f" {option}"


def _rationale(row: Row, place: Place) -> str:
    text = _field(row, "Rationale", place).strip()
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] == '"' else text


def _options(row: Row, place: Place) -> tuple[tuple[str, ...], int]:
    """The five options of a row and which is right; raises Unusable where they cannot be told."""
    options = parse_options(_field(row, "options", place))
    correct = _field(row, "correct", place).strip().lower()
    if len(options) != 5:
        raise Unusable("it has not five options")
    if correct not in options:
        raise Unusable("the letter of its right option is not one of a to e")
    return tuple(options[letter] for letter in LETTERS), LETTERS.index(correct)


_LIST_ITEM = re.compile(r"""\s*['"]\s*,\s*['"]\s*""")


_DOUBLED = re.compile(r"^[a-eA-E]\s*\)\s*(?=[^\s,])")


def parse_options(text: str) -> dict[str, str]:
    """Letter -> text of a MathQA `options` field, such as "a ) rs . 1,500 , b ) ( 3 , 4 ) , ...".

    A letter counts where it stands at the start or after a comma and in its turn, so commas and brackets inside an
    option stay whole. A letter that the text repeats ("a ) a ) 5") is dropped. Letters that are missing, or have no
    text, are missing from the answer. Lists written as Python does ("['a ) 1', 'b ) 2']") are read too.
    """
    text = text.strip()
    if text.startswith("[") and text.endswith("]") and re.match(r"\[\s*['\"]?\s*[a-eA-E]\s*\)", text):
        text = _LIST_ITEM.sub(" , ", text[1:-1].strip()).strip("'\" ")
    marks: list[tuple[str, int, int]] = []
    at = 0
    for letter in LETTERS:
        if mark := _mark(text, letter, at):
            marks.append((letter, mark.start(), mark.end()))
            at = mark.end()
    ends = [start for _, start, _ in marks[1:]] + [len(text)]
    options = {letter: text[begin:end].strip(" ,") for (letter, _, begin), end in zip(marks, ends, strict=False)}
    options = {letter: _DOUBLED.sub("", option) for letter, option in options.items()}
    return {letter: option for letter, option in options.items() if option}


def _mark(text: str, letter: str, start: int) -> re.Match[str] | None:
    """Where a letter's option begins: not inside a bracket that is open, as in "( 3 , b )"."""
    for mark in re.compile(rf"(?:^|,)\s*\(?\s*{letter}\s*\)", re.IGNORECASE).finditer(text, start):
        before = text[start : mark.start()]
        if before.count("(") <= before.count(")"):
            return mark
    return None
