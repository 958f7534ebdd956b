"""Tools and calls of tools, in the form that chat templates expect: objects, not their text in JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pretune.core.config import InputError
from pretune.data.formats.fields import parsed
from pretune.data.formats.segments import Place, Unusable

Record = dict[str, Any]


def read_tools(value: Any, column: str, place: Place) -> list[Record]:
    """The tools of a field: a list of JSON schemas, or its text. A bare {name, parameters, ...} becomes the
    {type: function, function: ...} that templates expect. Raises InputError for anything else."""
    tools = parsed(value, f"field '{column}'", place)
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise InputError(f"{place}: field '{column}' is not a list of tools but {type(tools).__name__}")
    found = [parsed(tool, f"a tool in field '{column}'", place) for tool in tools]
    if other := [tool for tool in found if not isinstance(tool, Mapping)]:
        raise InputError(f"{place}: a tool in field '{column}' is not a record but {type(other[0]).__name__}")
    return [_wrapped(tool) for tool in found]


def called(text: str) -> list[Any]:
    """The calls in a message whose text is a call {name, arguments} in JSON, or a list of them; otherwise Unusable."""
    found = _loaded(text, "one of its calls is not JSON")
    calls = found if isinstance(found, list) else [found]
    if not calls or any(not isinstance(call, Mapping) or "name" not in call for call in calls):
        raise Unusable("one of its calls is not JSON of the form {name, arguments}")
    return calls


def read_calls(value: Any, place: Place) -> list[Record]:
    """A message's calls, each {type: function, function: {name, arguments}} with the arguments as an object.

    Raises Unusable for arguments that are not an object, InputError for what is no call.
    """
    calls = parsed(value, "its calls", place)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise InputError(f"{place}: its calls are not a list but {type(calls).__name__}")
    return [_call(call, place) for call in calls]


def _call(value: Any, place: Place) -> Record:
    call = parsed(value, "one of its calls", place)
    if not isinstance(call, Mapping):
        raise InputError(f"{place}: one of its calls is not a record but {type(call).__name__}")
    call = _wrapped(call)
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f"{place}: one of its calls has no function with a name (it has: {', '.join(call)})")
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # as OpenAI's API writes them; a template would put the text into JSON once more
        arguments = _loaded(arguments, "the arguments of one of its calls are not JSON") if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise Unusable("the arguments of one of its calls are not an object")
    return {**call, "function": {**function, "arguments": dict(arguments)}}


def _wrapped(record: Mapping[str, Any]) -> Record:
    named = "name" in record and not isinstance(record.get("function"), Mapping)
    return {"type": "function", "function": dict(record)} if named else {"type": "function", **record}


def _loaded(text: str, reason: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise Unusable(reason) from None
