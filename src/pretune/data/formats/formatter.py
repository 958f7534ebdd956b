"""What every data format does: a row becomes documents, or the prompt before its answer.

One definition of a prompt serves training, evaluation and generation. Segments are tokenized one by one and joined, and
a prompt never ends in a space (the space belongs to the continuation), so all of them see the same tokens.
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
"""Raise when the same row would give other text: prepared data is addressed by it."""


class Formatter(ABC):
    """A data format. Each format is a subclass in a file of its own, and `formats.build` knows them all."""

    end_of_turn: str = ""
    """What ends an answer besides the end of the document: a special token or plain text; empty for nothing."""
    has_turns: bool = False
    """Whether a prompt may hold earlier turns of a chat. Other formats see the last message only."""

    @abstractmethod
    def documents(self, row: Row, place: Place) -> list[list[Segment]]:
        """The segments of each document that a row makes: one document, but for some chats and for preferences (two).

        No document is empty. Raises Unusable for a row to leave out, InputError for a row that lacks a field.
        """

    @abstractmethod
    def prompt(self, row: Row, place: Place) -> list[Segment]:
        """What the model is given of a row, whose answer need not be there: what `documents` puts before the answer."""

    @abstractmethod
    def render_prompt(self, messages: Sequence[Message]) -> list[Segment]:
        """The prompt for the answer to a chat's messages {role, content}, the last of which is the user's.

        Raises InputError where nothing is left to answer, or the chat template refuses the chat.
        """

    def as_row(self, messages: Sequence[Message]) -> Row:
        """The row of this format that holds a question and its answer, or a whole chat.

        Raises Unusable for messages that the format has no place for.
        """
        raise ConfigError("data.format.template must be a format of a prompt and its answer")

    def problem(self, row: Row, place: Place) -> Problem:
        """A multiple-choice problem, for formats whose sections say `has_options`; raises as `documents` does."""
        raise ConfigError("options can be compared for data.format.kind = mathqa with rationale none or after only")

    def question(self, row: Row, place: Place) -> Question:
        """A problem whose written answer can be judged, for formats whose sections say `has_answers`; raises as
        `documents` does."""
        raise ConfigError("written answers can be judged for data.format.kind = mathqa or gsm8k")


class PlainFormatter(Formatter):
    """A format without special tokens: a prompt is one text, of which only the last message of a chat becomes part."""

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
        """The answer of a row, with the space that it begins with."""
        raise NotImplementedError

    def ask(self, question: str) -> str:
        """A question as the prompt of a row that holds it."""
        return question.rstrip(" ")


def last_message(messages: Sequence[Message]) -> Message:
    """The message to answer; InputError where there is none."""
    if not messages or messages[-1]["role"] == "assistant":
        raise InputError("nothing is left for the assistant to answer: the last message must be someone else's")
    return messages[-1]


def single_turn(messages: Sequence[Message]) -> tuple[str, str]:
    """The texts of a question of the user and of its answer; Unusable for any other chat."""
    if [message["role"] for message in messages[:-1]] != ["user"]:
        raise Unusable("its prompt is not one message of the user, and only a chat template has a place for more")
    return messages[0]["content"], messages[1]["content"]


def field(row: Row, name: str, place: Place) -> str:
    """A field as text; InputError where it is missing or no text."""
    value: Any = row.get(name)
    if isinstance(value, str):
        return value
    if value is None:
        raise InputError(missing(row, name, place))
    if isinstance(value, int | float):
        return str(value)
    raise InputError(f"{place}: field '{name}' is not text but {type(value).__name__}")


def filled(row: Row, name: str, place: Place) -> str:
    """A field as text; Unusable where it is empty."""
    text = field(row, name, place)
    if not text.strip():
        raise Unusable(f"its {name} is empty")
    return text


def missing(row: Row, name: str, place: Place) -> str:
    """What to say of a row without the field `name`."""
    has = [key for key, value in row.items() if value is not None]
    return f"{place} has no field '{name}'{nearest(name, has)} (it has: {', '.join(has) or 'nothing'})"
