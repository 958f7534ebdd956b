"""Preferences: two answers to one prompt, as texts or lists of messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pretune.core.config import InputError
from pretune.data.formats.conversations import Message
from pretune.data.formats.formatter import Formatter, missing
from pretune.data.formats.segments import Place, Segment, Unusable
from pretune.data.sources.rows import Row


class Preferences(Formatter):
    """Rows of prompt, chosen and rejected. `template` is the format of a prompt with one of its answers; a prompt
    without answers is a row of that format."""

    def __init__(self, template: Formatter) -> None:
        self._template = template
        self.end_of_turn, self.has_turns = template.end_of_turn, template.has_turns

    def documents(self, row: Row, place: Place) -> list[list[Segment]]:
        """Two documents: the chosen side and the rejected side."""
        sides_as_rows = [self._template.as_row(messages) for messages in sides(row, place)]
        return [self._template.documents(side, place)[0] for side in sides_as_rows]

    def prompt(self, row: Row, place: Place) -> list[Segment]:
        return self._template.prompt(row, place)

    def render_prompt(self, messages: Sequence[Message]) -> list[Segment]:
        return self._template.render_prompt(messages)


def sides(row: Row, place: Place) -> tuple[list[Message], list[Message]]:
    """The messages of the chosen and of the rejected side, each including the prompt.

    The prompt may be a separate field or the common beginning of both sides. Raises Unusable for equal or empty sides
    and for sides that differ in more than the last answer, InputError for a row that is not a preference.
    """
    chosen, rejected = (_messages(row, name, "assistant", place) for name in ("chosen", "rejected"))
    if row.get("prompt") is None and (isinstance(row["chosen"], str) or isinstance(row["rejected"], str)):
        raise InputError(missing(row, "prompt", place))
    prompt = [] if row.get("prompt") is None else _messages(row, "prompt", "user", place)
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise Unusable("its sides are equal")
    prompt, answers = prompt + chosen[:shared], [chosen[shared:], rejected[shared:]]
    if not prompt or not _text(prompt).strip():
        raise Unusable("its prompt is empty")
    if any(not _text(answer).strip() for answer in answers):
        raise Unusable("one of its sides is empty")
    if any([message["role"] for message in answer] != ["assistant"] for answer in answers):
        raise Unusable("its sides differ in more than the assistant's last answer")
    first, second = (prompt + answer for answer in answers)
    return first, second


def _text(messages: Sequence[Message]) -> str:
    return "".join(message["content"] for message in messages)


def _messages(row: Row, name: str, role: str, place: Place) -> list[Message]:
    """A field as messages; a text becomes one message of `role`."""
    value = row.get(name)
    if value is None:
        raise InputError(missing(row, name, place))
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, Sequence):
        raise InputError(f"{place}: field '{name}' is neither text nor a list of messages but {type(value).__name__}")
    return [_message(item, f"{place}, field '{name}', message {number}") for number, item in enumerate(value, start=1)]


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise InputError(f"{where} is not a record with role and content but {type(item).__name__}")
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise InputError(f"{where} needs both role and content as text (it has: {', '.join(map(str, item))})")
    return {"role": role, "content": content}
