"""The base class of data formats: turn a row into documents, or into the prompt before its answer.

Training, evaluation and generation share one definition of a prompt. Segments are tokenized separately and joined, and
a prompt never ends in a space (the space belongs to the continuation), so all three see the same tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from pretune.core.config import ConfigError, InputError
from pretune.data.formats.fields import is_missing
from pretune.data.formats.grids import GridTask
from pretune.data.formats.messages import Message, Turn
from pretune.data.formats.problems import Problem, Question
from pretune.data.formats.segments import Place, Segment, Unusable
from pretune.data.sources.rows import Row

VERSION = 3
"""Increment when the same row would give different text: it is part of the cache key of prepared data."""


class Formatter(ABC):
    """A data format. Each format is a subclass in its own file; `formats.build` knows them all."""

    end_of_turn: str = ""
    """What ends an answer besides the end of the document: a special token or plain text; empty for nothing."""
    has_turns: bool = False
    """Whether a prompt may include earlier turns of a chat. Other formats use only the last message."""
    columns: frozenset[str] = frozenset()
    """The columns that it reads."""
    refuses_columns: bool = False
    """Whether it raises errors for columns that it has no place for."""
    columns_beside: frozenset[str] = frozenset()
    """The columns that it reads beside a prompt and its answer, which `answer_documents` is given."""

    @property
    def columns_needed(self) -> frozenset[str] | None:
        """The columns that decide what becomes of a row; None if any may."""
        return None if self.refuses_columns or not self.columns else self.columns

    @abstractmethod
    def documents(self, row: Row, place: Place) -> list[list[Segment]]:
        """The segments of each document of a row: usually one document; more for some chats, two for preferences.

        No document is empty. Raises Unusable for a row to leave out (Absent if it lacks a column), InputError for one
        that is of another kind.
        """

    @abstractmethod
    def prompt(self, row: Row, place: Place) -> list[Segment]:
        """The prompt of a row, exactly as `documents` puts it before the answer; the row need not have an answer."""

    @abstractmethod
    def render_prompt(self, messages: Sequence[Message]) -> list[Segment]:
        """The prompt for answering a chat's messages {role, content}, the last of which is the user's.

        Raises InputError if there is nothing to answer, or if the chat template rejects the chat.
        """

    def answer_documents(self, turns: list[Turn], row: Row, place: Place) -> list[list[Segment]]:
        """The documents of a prompt and its answer, read from `row` by another format; the row's other columns hold.

        Raises Unusable for messages that the format cannot represent.
        """
        raise ConfigError("data.format.template must be a format with a prompt and an answer")

    def unread(self, row: Row) -> set[str]:
        """The columns of a row that have something in them which the format does not read."""
        return {name for name in row.keys() - self.columns if not is_missing(row[name])}

    def problem(self, row: Row, place: Place) -> Problem:
        """A multiple-choice problem, for formats with `has_options`; raises the same errors as `documents`."""
        raise ConfigError(
            "options can be compared only for data.format.kind = multiple_choice, and mathqa with rationale none or "
            "after"
        )

    def question(self, row: Row, place: Place) -> Question:
        """A problem whose generated answer can be checked, for formats with `has_answers`; raises the same errors as
        `documents`."""
        raise ConfigError(
            "generated answers can be checked only for data.format.kind = mathqa, gsm8k or multiple_choice"
        )

    def task(self, row: Row, place: Place) -> GridTask:
        """A task of grids, for formats with `has_tasks`; raises the same errors as `documents`."""
        raise ConfigError("tasks of grids can be answered only for data.format.kind = arc")


class PlainFormatter(Formatter):
    """A format without special tokens: a prompt is a single text, which can include only the last message of a chat."""

    score_prompt: bool = False
    special: bool = False
    """Whether text that spells a special token becomes that token."""

    def documents(self, row: Row, place: Place) -> list[list[Segment]]:
        answer = self.answer(row, place)
        return [
            [
                Segment(self.prompt_text(row, place), self.score_prompt, self.special),
                Segment(answer, True, self.special),
            ]
        ]

    def prompt(self, row: Row, place: Place) -> list[Segment]:
        return [Segment(self.prompt_text(row, place), False, self.special)]

    def render_prompt(self, messages: Sequence[Message]) -> list[Segment]:
        return [Segment(self.ask(str(last_message(messages)["content"])), False, self.special)]

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


def single_turn(turns: Sequence[Turn]) -> tuple[str, str]:
    """The texts of a user's question and its answer; Unusable for any other chat."""
    messages = [turn.message for turn in turns]
    if [message["role"] for message in messages[:-1]] != ["user"]:
        raise Unusable("its prompt is not a single user message, and only a chat template supports more")
    if any(message.get("tool_calls") for message in messages):
        raise Unusable("it has calls of tools, and only a chat template supports them")
    return messages[0]["content"], messages[1]["content"]
