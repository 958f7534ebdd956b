"""How a row becomes text, and which of it is scored.

One definition of a prompt serves training, evaluation and generation. Segments are tokenized one by one and joined, and
a prompt never ends in a space (the space belongs to the continuation), so all of them see the same tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pretune.core.config import ConfigError, InputError, nearest
from pretune.data.config import (
    ChatFormat,
    DataConfig,
    FormatConfig,
    GSM8KFormat,
    InstructionFormat,
    MathQAFormat,
    PreferenceFormat,
    PromptCompletionFormat,
    SourceConfig,
    TextFormat,
)
from pretune.data.formats.chat_template import ChatTemplate, TemplateTokens
from pretune.data.formats.conversations import Message, conversation, read_messages
from pretune.data.formats.preferences import sides
from pretune.data.formats.segments import Place, Segment, Unusable
from pretune.data.sources.rows import Row, Side, numbered_rows

VERSION = 2
"""Raise when the same row would give other text: prepared data is addressed by it."""

LETTERS = "abcde"


@dataclass(frozen=True)
class Problem:
    """A multiple-choice problem: each option continues the prompt exactly as an answer does in training."""

    prompt: str
    options: tuple[str, ...]
    correct: int
    closing: str | None
    """What follows the answer in training; None: the document ends with it."""


class Formatter:
    """Rows as documents and as prompts, in one format; `tokens` is what the tokenizer brings to a chat template.

    `format` is how a prompt and its answer are written; of preferences, that of their template. Raises ConfigError for
    a chat template that is missing or cannot be used.
    """

    def __init__(self, format: FormatConfig, tokens: TemplateTokens) -> None:
        self._compares = isinstance(format, PreferenceFormat)
        self.format = format.template if isinstance(format, PreferenceFormat) else format
        self._template = ChatTemplate(self.format, tokens) if isinstance(self.format, ChatFormat) else None

    def documents(self, row: Row, place: Place) -> list[list[Segment]]:
        """The segments of each document that a row makes, one but for some conversations, two for a preference; none of
        them is empty.

        Raises Unusable for a row to leave out, InputError for a row that lacks a field.
        """
        if self._compares:
            assert isinstance(self.format, InstructionFormat | PromptCompletionFormat | ChatFormat)
            return [self._documents(side, place)[0] for side in sides(row, self.format, place)]
        return self._documents(row, place)

    def _documents(self, row: Row, place: Place) -> list[list[Segment]]:
        match self.format:
            case TextFormat():
                return [[Segment(_filled(row, self.format.column, place), True)]]
            case MathQAFormat():
                return [_mathqa_document(self.format, row, place)]
            case ChatFormat():
                assert self._template is not None
                return self._template.documents(conversation(self.format, row, place), place)
            case InstructionFormat():
                answer = _filled(row, "output", place)
            case PromptCompletionFormat():
                prompt = _field(row, self.format.prompt, place)
                answer = prompt[len(prompt.rstrip(" ")) :] + _filled(row, self.format.completion, place)
            case GSM8KFormat():
                answer = _gsm8k_answer(self.format, row, place)
        (prompt,) = self.prompt(row, place)
        return [[Segment(prompt.text, self.format.score_prompt), Segment(answer, True)]]

    def prompt(self, row: Row, place: Place) -> list[Segment]:
        """What the model is given of a row, whose answer need not be there: what `documents` puts before the answer."""
        match self.format:
            case TextFormat():
                text = _field(row, self.format.column, place)
            case MathQAFormat():
                text = _mathqa_prompt(self.format, row, place)
            case ChatFormat():
                messages = read_messages(self.format, row, place)
                answered = bool(messages) and messages[-1]["role"] == "assistant"
                return self.render_prompt(messages[:-1] if answered else messages)
            case InstructionFormat():
                context = "" if row.get("input") is None else _field(row, "input", place)
                text = _instruction_prompt(self.format, _field(row, "instruction", place), context)
            case PromptCompletionFormat():
                text = _field(row, self.format.prompt, place).rstrip(" ")
            case GSM8KFormat():
                text = f"Question: {_field(row, 'question', place).strip()}\nAnswer:"
        return [Segment(text, False)]

    def render_prompt(self, messages: Sequence[Message]) -> list[Segment]:
        """The prompt for the answer to a chat's messages {role, content}, the last of which is the user's.

        Formats without turns of their own see only that last message, put as their data puts a question. Raises
        InputError where nothing is left to answer, or the chat template refuses the chat.
        """
        if not messages or messages[-1]["role"] == "assistant":
            raise InputError("nothing is left for the assistant to answer: the last message must be someone else's")
        if self._template is not None:
            return self._template.prompt(messages)
        text = str(messages[-1]["content"])
        match self.format:
            case InstructionFormat():
                text = _instruction_prompt(self.format, text, "")
            case GSM8KFormat():
                text = f"Question: {text.strip()}\nAnswer:"
            case _:
                text = text.rstrip(" ")
        return [Segment(text, False)]

    @property
    def end_of_turn(self) -> str:
        """What ends an answer beside the end of the document, a special token or plain text; empty for nothing."""
        return self._template.end_of_turn if self._template is not None else ""


def documents(config: DataConfig, side: Side, tokens: TemplateTokens) -> Iterator[list[Segment]]:
    """The documents of one side; rows to leave out are skipped."""
    formatter, source = Formatter(config.format, tokens), side_source(config, side)
    for number, row in numbered_rows(config, side):
        try:
            yield from formatter.documents(row, Place(source, number))
        except Unusable:
            continue


def training_texts(config: DataConfig, tokens: TemplateTokens) -> Iterator[str]:
    """The text of every training document."""
    return ("".join(segment.text for segment in segments) for segments in documents(config, "train", tokens))


def problems(config: DataConfig) -> Iterator[Problem]:
    """The held-out multiple-choice problems, in the order of their source.

    Raises ConfigError for a format without options, or whose answer comes after the rationale.
    """
    format = config.format
    if not isinstance(format, MathQAFormat) or format.rationale == "before":
        raise ConfigError("options can be compared for data.format.kind = mathqa with rationale none or after only")
    source = side_source(config, "validation")
    for number, row in numbered_rows(config, "validation"):
        place = Place(source, number)
        try:
            options, correct = options_of(row, place)
        except Unusable:
            continue
        closing = _RATIONALE if format.rationale == "after" and _rationale(row, place) else None
        answers = tuple(_answer(option) for option in options)
        yield Problem(_mathqa_prompt(format, row, place), answers, correct, closing)


def side_source(config: DataConfig, side: Side) -> SourceConfig:
    """The source that a side's rows come from."""
    own = config.validation.source
    return own if side == "validation" and own is not None else config.source


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


def _filled(row: Row, name: str, place: Place) -> str:
    text = _field(row, name, place)
    if not text.strip():
        raise Unusable(f"its {name} is empty")
    return text


# Alpaca: the published prompts of the dataset, with which models are compared.
_PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)


def _instruction_prompt(format: InstructionFormat, instruction: str, context: str) -> str:
    if not context.strip():
        preamble = _PREAMBLE if format.preamble else ""
        return f"{preamble}### Instruction:\n{instruction}\n\n### Response:\n"
    preamble = _PREAMBLE_WITH_INPUT if format.preamble else ""
    return f"{preamble}### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"


# GSM8K


def final_answer(text: str) -> str | None:
    """The number after the last `####`, without dollar sign and thousands separators, or None."""
    found = _FINAL_ANSWER.findall(text)
    return found[-1].replace(",", "") if found else None


_FINAL_ANSWER = re.compile(r"####\s*\$?\s*(-?[\d,]*\.?\d+)")
_CALCULATION = re.compile(r"<<[^<>]*>>")


def _gsm8k_answer(format: GSM8KFormat, row: Row, place: Place) -> str:
    answer = _filled(row, "answer", place).strip()
    if final_answer(answer) is None:
        raise Unusable("its answer has no line '#### number'")
    return " " + (answer if format.calculations else _CALCULATION.sub("", answer))


# MathQA: without options, "{Problem} {answer}" as the reference system has it.


_RATIONALE = "\nrationale :"


def _mathqa_document(format: MathQAFormat, row: Row, place: Place) -> list[Segment]:
    options, correct = options_of(row, place)
    prompt = Segment(_mathqa_prompt(format, row, place), format.score_prompt)
    answer = Segment(_answer(options[correct]), True)
    rationale = "" if format.rationale == "none" else _rationale(row, place)
    if not rationale:
        return [prompt, answer]
    if format.rationale == "after":
        return [prompt, answer, Segment(f"{_RATIONALE} {rationale}", True)]
    return [prompt, Segment(f"{_RATIONALE} {rationale}\nanswer :", True), answer]


def _mathqa_prompt(format: MathQAFormat, row: Row, place: Place) -> str:
    problem = _field(row, "Problem", place).strip()
    if not format.options:
        return problem
    options, _ = options_of(row, place)
    listed = " , ".join(f"{letter} ) {option}" for letter, option in zip(LETTERS, options, strict=True))
    asked = "" if format.rationale == "before" else "\nanswer :"
    return f"{problem}\noptions : {listed}{asked}"


def _answer(option: str) -> str:
    return f" {option}"


def _rationale(row: Row, place: Place) -> str:
    text = _field(row, "Rationale", place).strip()
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] == '"' else text


def options_of(row: Row, place: Place) -> tuple[tuple[str, ...], int]:
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
