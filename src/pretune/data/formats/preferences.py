"""Pairs of answers to one prompt, as data sets give them: as texts, or as lists of messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pretune.core.config import InputError, nearest
from pretune.data.config import ChatFormat, InstructionFormat, PromptCompletionFormat
from pretune.data.formats.segments import Place, Unusable
from pretune.data.sources.rows import Row

Messages = list[tuple[str, str]]
"""Role and text of each message."""


Template = InstructionFormat | PromptCompletionFormat | ChatFormat


def sides(row: Row, template: Template, place: Place) -> tuple[Row, Row]:
    """The chosen and the rejected side of a row, each as a row of the format that writes it out.

    Messages may have the prompt in a field of its own or at the start of both sides. Raises Unusable for equal or empty
    sides and for conversations that the format has no place for, InputError for a row that is not a preference.
    """
    chosen, rejected = (_messages(row, name, "assistant", place) for name in ("chosen", "rejected"))
    if row.get("prompt") is None and (isinstance(row["chosen"], str) or isinstance(row["rejected"], str)):
        raise InputError(_missing(row, "prompt", place))
    prompt = [] if row.get("prompt") is None else _messages(row, "prompt", "user", place)
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise Unusable("its sides are equal")
    prompt, answers = prompt + chosen[:shared], [chosen[shared:], rejected[shared:]]
    if not prompt or not "".join(text for _, text in prompt).strip():
        raise Unusable("its prompt is empty")
    if any(not "".join(text for _, text in answer).strip() for answer in answers):
        raise Unusable("one of its sides is empty")
    if any([role for role, _ in answer] != ["assistant"] for answer in answers):
        raise Unusable("its sides differ in more than the last answer of the assistant")
    first, second = (_written(template, prompt, answer) for answer in answers)
    return first, second


def _written(template: Template, prompt: Messages, answer: Messages) -> Row:
    """A conversation as a row of the format `template`."""
    if isinstance(template, ChatFormat):
        role, content = template.role_keys[0], template.content_keys[0]
        return {template.columns[0]: [{role: who, content: text} for who, text in prompt + answer]}
    if [role for role, _ in prompt] != ["user"]:
        raise Unusable("its prompt is not one message of the user, and only a chat template has a place for more")
    question, reply = prompt[0][1], answer[0][1]
    if isinstance(template, InstructionFormat):
        return {"instruction": question, "output": reply}
    return {template.prompt: question, template.completion: reply}


def _messages(row: Row, name: str, role: str, place: Place) -> Messages:
    """A field as messages; a text is one message of `role`."""
    value = row.get(name)
    if value is None:
        raise InputError(_missing(row, name, place))
    if isinstance(value, str):
        return [(role, value)]
    if not isinstance(value, Sequence):
        raise InputError(f"{place}: field '{name}' is neither text nor a list of messages but {type(value).__name__}")
    return [_message(item, f"{place}, field '{name}', message {number}") for number, item in enumerate(value, start=1)]


def _message(item: Any, where: str) -> tuple[str, str]:
    if not isinstance(item, Mapping):
        raise InputError(f"{where} is not a record with role and content but {type(item).__name__}")
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise InputError(f"{where} has not both role and content as texts (it has: {', '.join(map(str, item))})")
    return role, content


def _missing(row: Row, name: str, place: Place) -> str:
    has = [key for key, value in row.items() if value is not None]
    return f"{place} has no field '{name}'{nearest(name, has)} (it has: {', '.join(has) or 'nothing'})"
