"""Read messages, and convert a data set's names for keys and roles to those of chat templates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pretune.core.config import InputError
from pretune.data.formats.config import MessagesBase, Names
from pretune.data.formats.fields import as_text, is_missing, parsed
from pretune.data.formats.segments import Absent, Place, Unusable
from pretune.data.formats.tools import called, read_calls

Message = dict[str, Any]
"""`role` (system, developer, user, assistant, tool), `content`, and other keys for templates (KEPT, `tool_calls`)."""

KEPT = ("name", "reasoning_content", "reasoning", "thinking", "tool_call_id")
"""Keys of a message that templates may read besides role, content and tool_calls; passed on as they are."""

_CALLS = ("tool_calls", "function_call")


class Turn(NamedTuple):
    """A message, and whether the data says that it is scored; None if it does not say."""

    message: Message
    scored: bool | None


def read_turns(names: MessagesBase, value: Any, column: str, place: Place) -> list[Turn]:
    """The messages of a field, which may be stored as JSON text.

    Raises Unusable for a message that is null or lacks its role, InputError for what is no list of messages.
    """
    messages = parsed(value, f"field '{column}'", place)
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise InputError(f"{place}: field '{column}' is not a list of messages but {type(messages).__name__}")
    return [
        read_turn(names, message, place.within(f"field '{column}', message {number}"))
        for number, message in enumerate(messages, start=1)
    ]


def read_turn(names: MessagesBase, message: Any, place: Place) -> Turn:
    """One message with the keys of chat templates; raises the errors of `read_turns`."""
    if message is None:
        raise Unusable("one of its messages is null")
    if not isinstance(message, Mapping):
        raise InputError(f"{place} is not a record with role and content but {type(message).__name__}")
    role = _role(names, message, place)
    calls = next((message[key] for key in _CALLS if message.get(key)), None)
    text = _text(_first(message, names.content_keys), place)
    if not text and calls is None and not any(key in message for key in names.content_keys):
        raise _lacks(message, "text", names.content_keys, place)
    if role == "tool_call":
        role, text, calls = "assistant", "", called(text)
    kept = {key: message[key] for key in KEPT if not is_missing(message.get(key))}
    if calls is not None:
        kept["tool_calls"] = read_calls(calls, place)
    return Turn({"role": role, "content": text, **kept}, _scored(names, role, message, place))


def unread_keys(names: MessagesBase, value: Any) -> set[str]:
    """The keys of a field's messages that nothing reads."""
    known = {*names.role_keys, *names.content_keys, *names.score_keys, *KEPT, *_CALLS}
    if not isinstance(value, Sequence) or isinstance(value, str):
        return set()
    records = [message for message in value if isinstance(message, Mapping)]
    return {key for one in records for key in one.keys() - known if not is_missing(one[key])}


def either(names: Iterable[str]) -> str:
    """The names as text: 'a' or 'b'."""
    return " or ".join(f"'{name}'" for name in names)


def _role(names: MessagesBase, message: Mapping[str, Any], place: Place) -> str:
    role = _first(message, names.role_keys)
    if role is None:
        if any(key in message for key in names.role_keys):
            raise Unusable("one of its messages has no role")
        raise _lacks(message, "role", names.role_keys, place)
    if not isinstance(role, str):
        raise InputError(f"{place}: its role is not text but {type(role).__name__}")
    if role not in names.roles:
        known = ", ".join(names.roles)
        raise InputError(
            f"{place}: unknown role '{role}' (known: {known}); map it, for instance: +data.format.roles.{role}=user"
        )
    return names.roles[role]


def _lacks(message: Mapping[str, Any], what: str, keys: Names, place: Place) -> Absent:
    return Absent(
        f"one of its messages has no {what}",
        lambda: f"{place} has no {either(keys)} (it has: {', '.join(map(str, message))}); name the key in data.format",
    )


def _text(content: Any, place: Place) -> str:
    """A message's text, which may be split into parts {type: text, text: ...}; empty if there is none."""
    if content is None:  # a tool call
        return ""
    if isinstance(content, list):
        kinds = [part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in content]
        if other := [kind for kind in kinds if kind != "text"]:
            raise InputError(f"{place}: its content has a part that is not text but {other[0]}")
        return "".join(_text(part.get("text"), place) for part in content)
    return as_text(content, "its content", place)


def _scored(names: MessagesBase, role: str, message: Mapping[str, Any], place: Place) -> bool | None:
    """Whether the message says that it is scored."""
    said: bool | None = None
    for key in names.score_keys:
        value = message.get(key)
        if is_missing(value):
            continue
        if value not in (0, 1):
            raise InputError(
                f"{place}: {key} = {value!r} is neither 0 nor 1, and a turn cannot be scored in part; change it, or "
                f"take '{key}' out of data.format.score_keys"
            )
        if value and role != "assistant":
            raise InputError(
                f"{place}: {key} = {value!r} asks to score a {role} message, but only the assistant's can be; change "
                f"it, or take '{key}' out of data.format.score_keys"
            )
        said = bool(value) and said is not False
    return said


def _first(message: Mapping[str, Any], keys: Names) -> Any:
    return next((message[key] for key in keys if not is_missing(message.get(key))), None)
