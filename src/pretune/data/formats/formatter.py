"""The base class of data formats: turn a row into documents, or into the prompt before its answer.

Training, evaluation and generation share one definition of a prompt. Segments are tokenized separately and joined, and
a prompt never ends in a space (the space belongs to the continuation), so all three see the same tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from pretune.core.config import ConfigError, InputError, nearest
from pretune.data.formats.conversations import Message
from pretune.data.formats.problems import Problem, Question
from pretune.data.formats.segments import Place, Segment, Unusable
from pretune.data.sources.rows import Row

VERSION = 2
"""Increment when the same row would give different text: it is part of the cache key of prepared data."""


class Formatter(ABC):
    """A data format. Each format is a subclass in its own file; `formats.build` knows them all."""

    end_of_turn: str = ""
    """What ends an answer besides the end of the document: a special token or plain text; empty for nothing."""
    has_turns: bool = False
    """Whether a prompt may include earlier turns of a chat. Other formats use only the last message."""

    @abstractmethod
    def documents(self, row: Row, place: Place) -> list[list[Segment]]:
        """The segments of each document of a row: usually one document; more for some chats, two for preferences.

        No document is empty. Raises Unusable for a row to leave out, InputError for a row that lacks a field.
        """

    @abstractmethod
    def prompt(self, row: Row, place: Place) -> list[Segment]:
        """The prompt of a row, exactly as `documents` puts it before the answer; the row need not have an answer."""

    @abstractmethod
    def render_prompt(self, messages: Sequence[Message]) -> list[Segment]:
        """The prompt for answering a chat's messages {role, content}, the last of which is the user's.

        Raises InputError if there is nothing to answer, or if the chat template rejects the chat.
        """

    def as_row(self, messages: Sequence[Message]) -> Row:
        """A row of this format with a question and its answer, or a whole chat.

        Raises Unusable for messages that the format cannot represent.
        """
        raise ConfigError("data.format.template must be a format with a prompt and an answer")

    def problem(self, row: Row, place: Place) -> Problem:
        """A multiple-choice problem, for formats with `has_options`; raises the same errors as `documents`."""
        raise ConfigError("options can be compared only for data.format.kind = mathqa with rationale none or after")

    def question(self, row: Row, place: Place) -> Question:
        """A problem whose generated answer can be checked, for formats with `has_answers`; raises the same errors as
        `documents`."""
        raise ConfigError("generated answers can be checked only for data.format.kind = mathqa or gsm8k")


class PlainFormatter(Formatter):
    """A format without special tokens: a prompt is a single text, which can include only the last message of a chat."""

    score_prompt: bool = False

    def documents(self, row: Row, place: Place) -> list[list[Segment]]:
        answer = self.answer(row, place)
        return [[Segment(self.prompt_text(row, place), self.score_prompt), Segment(answer, True)]]

    def prompt(self, row: Row, place: Place) -> list[Segment]:
        return [Segment(self.prompt_text(row, place), False)]

    def render_prompt(self, messages: Sequence[Message]) -> list[Segment]:
        return [Segment(self.ask(str(last_message(messages)["content"])), False)]

    @abstractmethod
    def prompt_text(self, row: Row, place: Place) -> str:
        """The prompt of a row."""

    def answer(self, row: Row, place: Place) -> str:
        """The answer of a row, including its leading space."""
        raise NotImplementedError

    def ask(self, question: str) -> str:
        """The prompt for a question."""
        return question.rstrip(" ")


def last_message(messages: Sequence[Message]) -> Message:
    """The message to answer; InputError if there is none."""
    if not messages or messages[-1]["role"] == "assistant":
        raise InputError("there is nothing to answer: the last message must not be the assistant's")
    return messages[-1]


def single_turn(messages: Sequence[Message]) -> tuple[str, str]:
    """The texts of a user's question and its answer; Unusable for any other chat."""
    if [message["role"] for message in messages[:-1]] != ["user"]:
        raise Unusable("its prompt is not a single user message, and only a chat template supports more")
    return messages[0]["content"], messages[1]["content"]


def field(row: Row, name: str, place: Place) -> str:
    """A field as text; InputError if it is missing or not text."""
    value: Any = row.get(name)
    if isinstance(value, str):
        return value
    if value is None:
        raise InputError(missing(row, name, place))
    if isinstance(value, int | float):
        return str(value)
    raise InputError(f"{place}: field '{name}' is not text but {type(value).__name__}")


def filled(row: Row, name: str, place: Place) -> str:
    """A field as text; Unusable if it is empty."""
    text = field(row, name, place)
    if not text.strip():
        raise Unusable(f"its {name} is empty")
    return text


def missing(row: Row, name: str, place: Place) -> str:
    """The error message for a row without the field `name`."""
    has = [key for key, value in row.items() if value is not None]
    return f"{place} has no field '{name}'{nearest(name, has)} (it has: {', '.join(has) or 'nothing'})"
