"""Preferences: two answers to one prompt, as texts or lists of messages."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pretune.data.formats.config import PreferenceFormat
from pretune.data.formats.conversations import is_empty, is_scored
from pretune.data.formats.fields import as_text, is_missing, no_field, present
from pretune.data.formats.formatter import Formatter
from pretune.data.formats.messages import Message, Turn, read_turns, unread_keys
from pretune.data.formats.segments import Absent, Place, Segment, Unusable
from pretune.data.sources.rows import Row


class Preferences(Formatter):
    """Rows of prompt, chosen and rejected. `template` is the format of a prompt with one of its answers; a prompt
    without answers is a row of that format."""

    def __init__(self, config: PreferenceFormat, template: Formatter) -> None:
        self._config, self._template = config, template
        self.end_of_turn, self.has_turns = template.end_of_turn, template.has_turns

    def documents(self, row: Row, place: Place) -> list[list[Segment]]:
        """Two documents: the chosen side and the rejected side."""
        return [self._template.answer_documents(side, row, place)[0] for side in sides(self._config, row, place)]

    def prompt(self, row: Row, place: Place) -> list[Segment]:
        return self._template.prompt(row, place)

    def render_prompt(self, messages: Sequence[Message]) -> list[Segment]:
        return self._template.render_prompt(messages)

    def unread(self, row: Row) -> set[str]:
        read = {present(row, self._config.prompt_columns), "chosen", "rejected", *self._template.columns_beside}
        columns = {name for name in row.keys() - read if not is_missing(row[name])}
        keys = {f"{name}[].{key}" for name in ("chosen", "rejected") for key in unread_keys(self._config, row[name])}
        return columns | keys


def sides(config: PreferenceFormat, row: Row, place: Place) -> tuple[list[Turn], list[Turn]]:
    """The turns of the chosen and of the rejected side, each including the prompt.

    The prompt may be a separate field or the common beginning of both sides, or both. Raises Unusable for a side that
    is missing or empty, for equal sides, and for sides that differ in more than the last answer; InputError for a row
    that is not a preference.
    """
    column = present(row, config.prompt_columns)
    prompt = [] if column is None else _turns(config, row, column, "user", place)
    chosen, rejected = (_turns(config, row, name, "assistant", place) for name in ("chosen", "rejected"))
    if column is None and any(turns[0].message["role"] == "assistant" for turns in (chosen, rejected) if turns):
        _refuse_without_prompt(config, row, place)
    chosen, rejected = _without_repetition(prompt, chosen, rejected)
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared].message == rejected[shared].message:
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise Unusable("its sides are equal")
    prompt, answers = _joined(prompt, chosen[:shared]), [chosen[shared:], rejected[shared:]]
    if not any(not is_empty(turn.message) for turn in prompt):
        raise Unusable("its prompt is empty")
    if any(all(is_empty(turn.message) for turn in answer) for answer in answers):
        raise Unusable("one of its sides is empty")
    if any([turn.message["role"] for turn in answer] != ["assistant"] for answer in answers):
        raise Unusable("its sides differ in more than the assistant's last answer")
    if not all(is_scored(turn) for answer in answers for turn in answer):
        raise Unusable("one of its answers is not to be scored")
    first, second = (prompt + answer for answer in answers)
    return first, second


def _refuse_without_prompt(config: PreferenceFormat, row: Row, place: Place) -> None:
    """Raise Unusable for a row whose prompt is null, Absent for one without any of the columns for it."""
    if any(name in row for name in config.prompt_columns):
        raise Unusable("it has no prompt")
    raise Absent(
        "it has no prompt",
        lambda: f"{no_field(row, config.prompt_columns[0], place)}; name its column in data.format.prompt_columns",
    )


def _turns(config: PreferenceFormat, row: Row, name: str, role: str, place: Place) -> list[Turn]:
    """A field as turns; a text becomes one turn of `role`, unless it is a transcript or messages stored as JSON."""
    if name not in row:
        raise Absent(f"it has no {name}", lambda: no_field(row, name, place))
    value = row[name]
    if is_missing(value):
        raise Unusable(f"it has no {name}")
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return read_turns(config, value, name, place)
    if isinstance(value, Mapping):  # one message in place of a list of one
        return read_turns(config, [value], name, place)
    text = as_text(value, f"field '{name}'", place)
    if (messages := _stored_messages(config, text)) is not None:
        return read_turns(config, messages, name, place)
    if text.startswith("\n\nHuman:") and "\n\nAssistant:" in text:
        said = _transcript(text)
        return said[:-1] if is_empty(said[-1].message) else said
    return [Turn({"role": role, "content": text}, None)]


def _stored_messages(config: PreferenceFormat, text: str) -> list[Any] | None:
    """The messages that a text in JSON holds, or None for any other text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return None
    names = set(config.role_keys)
    return found if found and all(isinstance(one, Mapping) and names & one.keys() for one in found) else None


def _transcript(text: str) -> list[Turn]:
    """The turns of a text as Anthropic/hh-rlhf writes conversations."""
    _, *parts = re.split(r"\n\n(Human|Assistant):", text)
    roles = ("user" if name == "Human" else "assistant" for name in parts[::2])
    said = zip(roles, parts[1::2], strict=True)
    return [Turn({"role": role, "content": words.strip()}, None) for role, words in said]


def _without_repetition(prompt: list[Turn], *answers: list[Turn]) -> list[list[Turn]]:
    """The answers without the prompt's text, where both begin with it.

    A prompt of one or two words may also begin both answers by chance ("Hello", "Hello! How are you?"), so it has to
    be longer or to end as a question does.
    """
    texts = [turns[0].message["content"] for turns in (prompt, *answers) if len(turns) == 1]
    if len(texts) < 1 + len(answers):
        return list(answers)
    asked = texts[0].strip()
    longer = len(asked.split()) >= 3 or asked.endswith(("?", ":"))
    if not longer or not all(text.lstrip().startswith(asked) for text in texts[1:]):
        return list(answers)
    rest = (text.lstrip().removeprefix(asked).lstrip() for text in texts[1:])
    return [
        [Turn({**turns[0].message, "content": text}, turns[0].scored)]
        for turns, text in zip(answers, rest, strict=True)
    ]


def _joined(prompt: list[Turn], shared: list[Turn]) -> list[Turn]:
    """The prompt and the turns that both sides begin with, which may repeat the prompt, or its last turns."""
    said = [_said(turn) for turn in shared]
    asked = [_said(turn) for turn in prompt]
    for start in range(len(said) - len(asked) + 1):
        if asked and said[start : start + len(asked)] == asked:
            return shared
    return prompt + shared


def _said(turn: Turn) -> tuple[str, str]:
    return turn.message["role"], turn.message["content"].strip()
