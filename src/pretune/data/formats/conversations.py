"""Read a row's conversation, and what the row says of it beside its messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from pretune.core.config import InputError, nearest
from pretune.data.formats.config import ChatFormat, Names
from pretune.data.formats.fields import as_text, is_missing, no_field, parsed, present
from pretune.data.formats.messages import Message, Turn, either, read_turns, unread_keys
from pretune.data.formats.segments import Absent, Place, Unusable
from pretune.data.formats.tools import Record, read_tools
from pretune.data.sources.rows import Row


@dataclass(frozen=True)
class Conversation:
    """A chat's turns, the tools it may use, and variables of the template for it alone."""

    turns: list[Turn]
    tools: list[Record] = field(default_factory=list)
    variables: dict[str, Any] = field(default_factory=dict)

    @property
    def messages(self) -> list[Message]:
        return [turn.message for turn in self.turns]


def trainable(conversation: Conversation) -> Conversation:
    """The conversation up to the last assistant turn that is scored; what follows is of no use.

    Raises Unusable for a conversation that has no such turn, has an empty turn, or starts with the assistant.
    """
    roles = [turn.message["role"] for turn in conversation.turns]
    if "assistant" not in roles:
        raise Unusable("it has no assistant turn")
    scored = [number for number, turn in enumerate(conversation.turns, start=1) if is_scored(turn)]
    if not scored:
        raise Unusable("none of its turns is to be scored")
    if next(role for role in roles if role not in ("system", "developer")) == "assistant":
        raise Unusable("it starts with the assistant")
    turns = conversation.turns[: scored[-1]]
    if any(is_empty(turn.message) for turn in turns):
        raise Unusable("it has an empty turn")
    return replace(conversation, turns=turns)


def is_scored(turn: Turn) -> bool:
    """Whether a turn is scored: the assistant's, unless the data says otherwise."""
    return turn.message["role"] == "assistant" and turn.scored is not False


def is_empty(message: Message) -> bool:
    """Whether a message has neither text nor calls; a tool may well return nothing."""
    return message["role"] != "tool" and not message["content"].strip() and not message.get("tool_calls")


def read_conversation(config: ChatFormat, row: Row, place: Place, completed: bool) -> Conversation:
    """The conversation of a row: a list of messages, or else a prompt with its completion, and the columns beside them.

    `completed`: a prompt without a completion will not do. A prompt's own assistant turns are not scored. Raises
    Unusable for a row without a conversation (Absent if it has none of the columns), InputError for one that cannot be
    read.
    """
    column = present(row, config.columns)
    if column is not None:
        turns = read_turns(config, row[column], column, place)
    elif (prompt := present(row, config.prompt_columns)) is not None:
        turns = [Turn(turn.message, False) for turn in _prompt(config, row, prompt, place)]
        completion = present(row, config.completion_columns)
        if completion is not None:
            turns += _turns(config, row[completion], completion, "assistant", place)
        elif completed:
            raise _none(row, "completion", config.completion_columns, lambda: _no_completion(config, row, place))
    else:
        columns = (*config.columns, *config.prompt_columns)
        raise _none(row, "messages", columns, lambda: _no_messages(config, row, place))
    return with_columns(config, turns, row, place)


def with_columns(config: ChatFormat, turns: list[Turn], row: Row, place: Place) -> Conversation:
    """The turns with what the row's columns put before them (system message, history) and beside them."""
    history = present(row, config.history_columns)
    if history is not None:
        earlier = _history(config, row[history], history, place)
        leading = next((at for at, turn in enumerate(turns) if turn.message["role"] != "system"), len(turns))
        turns = turns[:leading] + earlier + turns[leading:]
    system = present(row, config.system_columns)
    text = "" if system is None else as_text(row[system], f"field '{system}'", place)
    if text.strip():
        first = turns[0].message if turns else None
        if first is None or first["role"] != "system":
            turns = [Turn({"role": "system", "content": text}, None), *turns]
        elif first["content"].strip() != text.strip():
            raise Unusable(f"its {system} column differs from its system message")
    tools, variables = present(row, config.tools_columns), present(row, config.variables_columns)
    return Conversation(
        turns,
        [] if tools is None or row[tools] == "" else read_tools(row[tools], tools, place),
        {} if variables is None else _variables(row[variables], variables, place),
    )


def columns_beside(config: ChatFormat) -> frozenset[str]:
    """The columns that are read beside the messages."""
    groups = (config.system_columns, config.history_columns, config.tools_columns, config.variables_columns)
    return frozenset(chain.from_iterable(groups))


def unread(config: ChatFormat, row: Row) -> set[str]:
    """The columns of a row that nothing reads, and keys of messages, as COLUMN[].KEY."""
    column = present(row, config.columns)
    prompts = () if column else (*config.prompt_columns, *config.input_columns, *config.completion_columns)
    found = {name for name in row.keys() - {column, *prompts} - columns_beside(config) if not is_missing(row[name])}
    return found | ({f"{column}[].{key}" for key in unread_keys(config, row[column])} if column else set())


def _prompt(config: ChatFormat, row: Row, column: str, place: Place) -> list[Turn]:
    turns = _turns(config, row[column], column, "user", place)
    more = present(row, config.input_columns)
    if more is None or not isinstance(row[column], str):
        return turns
    text = as_text(row[more], f"field '{more}'", place)
    message = turns[0].message
    if is_empty(message) or not text.strip():
        return turns
    return [Turn({**message, "content": f"{message['content']}\n{text}"}, None)]


def _turns(config: ChatFormat, value: Any, column: str, role: str, place: Place) -> list[Turn]:
    """A field as turns; a text becomes one of `role`."""
    if isinstance(value, list | tuple):
        return read_turns(config, value, column, place)
    return [Turn({"role": role, "content": as_text(value, f"field '{column}'", place)}, None)]


def _history(config: ChatFormat, value: Any, column: str, place: Place) -> list[Turn]:
    found = parsed(value, f"field '{column}'", place)
    pairs = isinstance(found, list | tuple) and all(isinstance(one, list | tuple) and len(one) == 2 for one in found)
    if not pairs:
        return read_turns(config, found, column, place)
    said = ((role, text) for pair in found for role, text in zip(("user", "assistant"), pair, strict=True))
    return [turn for role, text in said for turn in _turns(config, text, column, role, place)]


def _variables(value: Any, column: str, place: Place) -> dict[str, Any]:
    found = parsed(value, f"field '{column}'", place)
    if not isinstance(found, Mapping):
        raise InputError(f"{place}: field '{column}' is not a record of variables but {type(found).__name__}")
    return {name: one for name, one in found.items() if one is not None}


def _none(row: Row, what: str, columns: Names, explain: Callable[[], str]) -> Unusable:
    """Why a row is left out that has nothing in any of these columns."""
    reason = f"it has no {what}"
    return Unusable(reason) if any(name in row for name in columns) else Absent(reason, explain)


def _no_completion(config: ChatFormat, row: Row, place: Place) -> str:
    known = either(config.completion_columns) or "none"
    return f"{no_field(row, 'completion', place)}; name its column in data.format.completion_columns (now {known})"


def _no_messages(config: ChatFormat, row: Row, place: Place) -> str:
    has = [key for key, value in row.items() if value is not None]
    near = nearest(config.columns[0], has)
    return (
        f"{place} has no field {either(config.columns)}{near} (it has: {', '.join(has) or 'nothing'}), and no prompt "
        f"in {either(config.prompt_columns)}; name the column of messages in data.format.columns"
    )
