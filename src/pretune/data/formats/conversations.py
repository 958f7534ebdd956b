"""Read a row's conversation, and convert a data set's names for roles and keys to those of chat templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pretune.core.config import InputError, nearest
from pretune.data.formats.config import ChatFormat
from pretune.data.formats.segments import Place, Unusable
from pretune.data.sources.rows import Row

Message = dict[str, Any]
"""`role` (system, user, assistant, tool), `content`, and other keys for templates (KEPT)."""

KEPT = ("name", "reasoning_content", "thinking", "tool_calls", "tool_call_id")
"""Keys of a message that templates may read besides role and content."""


def conversation(config: ChatFormat, row: Row, place: Place) -> list[Message]:
    """The messages of a row up to the last assistant message; later ones are never scored.

    Raises Unusable for a conversation that has no assistant turn, has an empty turn, or starts with the assistant;
    InputError for a row that is not a conversation, and for a role that is not in the configuration.
    """
    messages = read_messages(config, row, place)
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise Unusable("it has no assistant turn")
    messages = messages[: len(roles) - roles[::-1].index("assistant")]
    if next(role for role in roles if role != "system") == "assistant":
        raise Unusable("it starts with the assistant")
    if any(not message["content"].strip() and not message.get("tool_calls") for message in messages):
        raise Unusable("it has an empty turn")
    return messages


def read_messages(config: ChatFormat, row: Row, place: Place) -> list[Message]:
    """All messages of a row, with the roles and keys of chat templates."""
    column = next((name for name in config.columns if row.get(name) is not None), None)
    if column is None:
        has = [key for key, value in row.items() if value is not None]
        near = nearest(config.columns[0], has)
        raise InputError(
            f"{place} has no field {_either(config.columns)}{near} (it has: {', '.join(has) or 'nothing'}); name the "
            "column of messages in data.format.columns"
        )
    messages = row[column]
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise InputError(f"{place}: field '{column}' is not a list of messages but {type(messages).__name__}")
    return [_message(config, message, f"{place}, message {number}") for number, message in enumerate(messages, start=1)]


def _message(config: ChatFormat, message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise InputError(f"{where} is not a record with role and content but {type(message).__name__}")
    role = _first(message, config.role_keys)
    if role is None:
        raise InputError(f"{where} has no {_either(config.role_keys)} (it has: {', '.join(map(str, message))})")
    if role not in config.roles:
        known = ", ".join(config.roles)
        raise InputError(
            f"{where}: unknown role '{role}' (known: {known}); map it, for instance: +data.format.roles.{role}=user"
        )
    kept = {key: message[key] for key in KEPT if message.get(key) is not None}
    return {"role": config.roles[role], "content": _text(_first(message, config.content_keys), where), **kept}


def _text(content: Any, where: str) -> str:
    """A message's text, which may be split into parts {type: text, text: ...}."""
    if content is None:  # a tool call
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    raise InputError(f"{where}: its content is not text but {type(content).__name__}")


def _first(message: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((message[key] for key in keys if message.get(key) is not None), None)


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(f"'{name}'" for name in names)
