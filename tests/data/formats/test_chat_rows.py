"""Chats as data sets write them: each gives what transformers renders for the same messages in their plain form."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import data_config, error_of_every_row, files
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from pretune.core.config import InputError
from pretune.data.formats.build import build_formatter
from pretune.data.formats.formatter import Formatter
from pretune.data.formats.segments import Place, Unusable
from pretune.data.tokenizer import Tokenizer, load_tokenizer, train_byte_level

PLACE = Place(data_config(source=files("a.jsonl")).source, 6)
SHARED = Path(__file__).parents[4] / "shared" / "data" / "tokenizers" / "qwen2.5"

CALLS = (  # ChatML as Hermes and Qwen write calls, with the tools before the chat
    "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}"
    "<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "{% endif %}{% endif %}"
)
ASK: dict[str, Any] = {"role": "user", "content": "Rain in Oslo?"}
SAY: dict[str, Any] = {"role": "assistant", "content": "No."}
WEATHER = {"name": "rain", "description": "Is there rain?", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": WEATHER}


@cache
def own() -> Tokenizer:
    """Bytes, and the special tokens of CALLS."""
    backend = train_byte_level(iter(["a"]), 257, False)
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    return Tokenizer(backend, "<|im_end|>")


def qwen() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"real data not found at {SHARED}; the other tests do not need it")
    return SHARED


@cache
def qwens() -> Tokenizer:
    config = data_config(tokenizer={"kind": "file", "path": str(qwen()), "eos": "<|im_end|>", "add_tokens": []})
    return load_tokenizer(config.tokenizer, config, Path())


def chat(template: str | None = CALLS, **changes: Any) -> Formatter:
    """A chat format, with Qwen2.5's own tokenizer and template if `template` is None."""
    config = data_config(format={"kind": "chat", "template": template} | changes)
    return build_formatter(config.format, (own() if template else qwens()).template_tokens)


def whole(formatter: Formatter, row: dict[str, Any]) -> str:
    """A row's only document, with its end, which preparation adds."""
    (document,) = formatter.documents(row, PLACE)
    return "".join(segment.text for segment in document) + "<|im_end|>"


def scored(formatter: Formatter, row: dict[str, Any]) -> str:
    return "".join(one.text for document in formatter.documents(row, PLACE) for one in document if one.scored)


@cache
def reference(template: str | None) -> Any:
    """transformers' tokenizer with the template."""
    if template is None:
        return PreTrainedTokenizerFast.from_pretrained(qwen())
    return PreTrainedTokenizerFast(tokenizer_object=own().backend, chat_template=template)


def rendered(messages: list[dict[str, Any]], template: str | None = CALLS, **extra: Any) -> str:
    """What transformers renders."""
    text = reference(template).apply_chat_template(messages, tokenize=False, **extra)
    assert isinstance(text, str)
    return text.rstrip()


def call(arguments: Any, name: str = "rain") -> dict[str, Any]:
    inner = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": inner}]}


names = st.text("ab_", min_size=1, max_size=3)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("aé\"\\ <{", max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


@pytest.mark.parametrize("template", [CALLS, None])
@given(arguments=st.dictionaries(names, values, max_size=3), shift=st.integers(0, 4))
@settings(max_examples=30, deadline=None)
def test_calls_are_objects_however_they_are_stored(template: str | None, arguments: dict[str, Any], shift: int) -> None:
    """And the tools beside them: each form of one with each of the other, over the examples."""
    of = chat(template)
    messages = [ASK, call(arguments), {"role": "tool", "content": "no", "name": "rain"}, SAY]
    expected = rendered(messages, template, tools=[TOOL])
    text = json.dumps(arguments)
    openai = {"role": "assistant", "content": None, "function_call": {"name": "rain", "arguments": text}}
    glaive = {"role": "function_call", "content": json.dumps({"name": "rain", "arguments": arguments})}
    bare = {"role": "assistant", "tool_calls": [{"name": "rain", "arguments": arguments}]}
    written = {"role": "assistant", "tool_calls": json.dumps(bare["tool_calls"])}
    offered = ([TOOL], [WEATHER], json.dumps([WEATHER]), json.dumps([TOOL]), [json.dumps(WEATHER)])
    for number, turn in enumerate((messages[1], call(text), openai, glaive, bare, written), shift):
        row = {
            "messages": [ASK, turn, {"role": "observation", "content": "no", "name": "rain"}, SAY],
            "tools": offered[number % len(offered)],
        }
        before = copy.deepcopy(row)
        assert whole(of, row) == expected
        assert row == before, "what is read stays as it is"


def test_calls_that_are_no_calls() -> None:
    for arguments, reason in (
        ("{", "not JSON"),
        ("[1]", "not an object"),
        ("5", "not an object"),
        (4, "not an object"),
    ):
        with pytest.raises(Unusable, match=f"the arguments of one of its calls are {reason}"):
            chat().documents({"messages": [ASK, call(arguments)]}, PLACE)
    for empty in ("", " ", None):
        assert whole(chat(), {"messages": [ASK, call(empty)]}) == rendered([ASK, call({})])
    for text in ("rain()", "[]", '{"arguments": {}}', "[1]"):
        with pytest.raises(Unusable, match="one of its calls is not JSON"):
            chat().documents({"messages": [ASK, {"role": "function_call", "content": text}]}, PLACE)
    for wrong, message in (([5], "is not a record but int"), ([{"id": 1}], "no function with a name"),
                           ("none", "its calls is text, but not JSON")):  # fmt: skip
        with pytest.raises(InputError, match=f"row 7, field 'messages', message 2: .*{message}"):
            chat().documents({"messages": [ASK, {"role": "assistant", "tool_calls": wrong}]}, PLACE)


def test_a_conversation_is_the_same_in_every_layout() -> None:
    of = chat()
    system = {"role": "system", "content": "Be brief."}
    messages = [
        system,
        ASK,
        SAY,
        {"role": "user", "content": "Why?\nSay it."},
        {"role": "assistant", "content": "Luck."},
    ]
    expected = rendered(messages)
    last, end = messages[4]["content"], messages[4:]
    rows: list[dict[str, Any]] = [
        {"messages": messages},
        {"messages": json.dumps(messages), "tools": None, "system": ""},
        {"conversations": [{"from": one["role"], "value": one["content"]} for one in messages]},
        {"conversation": [{"role": "developer", "content": "Be brief."}, *messages[1:]]},
        {"messages": messages[1:], "system": "Be brief."},
        {"messages": messages, "system_prompt": "Be brief. "},
        {"messages": messages[3:], "system": "Be brief.", "history": [[ASK["content"], SAY["content"]]]},
        {"messages": [system, *messages[3:]], "history": json.dumps([ASK, SAY])},
        {"instruction": "Why?", "input": "Say it.", "output": last, "history": [["Rain in Oslo?", "No."]],
         "system": "Be brief."},
        {"prompt": messages[:4], "completion": end},
        {"prompt": messages[:4], "completion": last},
        {"query": messages[3]["content"], "response": end, "system": "Be brief.", "history": [ASK, SAY]},
    ]  # fmt: skip
    for row in rows:
        assert whole(of, row) == expected, row
        assert of.prompt(row, PLACE) == of.render_prompt(messages[:-1]), row
        (document,) = of.documents(row, PLACE)
        assert [one.text for one in document[:-1]] == [one.text for one in of.prompt(row, PLACE)], (
            "cut where it is asked"
        )
    assert scored(of, rows[9]) == "Luck.", "a prompt's own answers are not scored"
    assert scored(of, rows[0]) == "No.<|im_end|>Luck."


def test_the_rows_system_message_takes_the_place_of_the_templates_own() -> None:
    row = {"messages": [ASK, SAY], "system": "You are a pirate."}
    own = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + CALLS
    assert whole(chat(own), row) == rendered([{"role": "system", "content": row["system"]}, ASK, SAY], own)
    assert "You help." not in whole(chat(own), row)
    assert "You help." in whole(chat(own), {"messages": row["messages"]})
    other = {"messages": [{"role": "system", "content": "x"}, ASK, SAY], "system": "y"}
    with pytest.raises(Unusable, match="its system column differs from its system message"):
        chat().documents(other, PLACE)
    assert whole(chat(system_columns=[]), other) == rendered(other["messages"])


def test_turns_that_the_data_leaves_out_are_not_scored() -> None:
    bad, good = SAY | {"content": "Wrong."}, {"role": "assistant", "content": "Right."}
    for flag in ({"train": False}, {"weight": 0}, {"loss": False}, {"weight": 0.0, "train": True}):
        row = {"messages": [ASK, bad | flag, ASK, good | {"weight": 1, "loss": None}]}
        assert whole(chat(), row) == rendered([ASK, bad, ASK, good])
        assert scored(chat(), row) == "Right."
        (only,) = chat(assistant_turns="apart").documents(row, PLACE)
        assert [segment.text for segment in only if segment.scored] == ["Right."]
        # What follows the last scored turn is of no use.
        assert whole(chat(), {"messages": [ASK, good, ASK, bad | flag]}) == rendered([ASK, good])
        with pytest.raises(Unusable, match="none of its turns is to be scored"):
            chat().documents({"messages": [ASK, bad | flag]}, PLACE)
    for value in (0.5, 2, "no", -1):
        with pytest.raises(InputError, match=rf"message 2: weight = {value!r} is neither 0 nor 1.*'weight' out of"):
            chat().documents({"messages": [ASK, SAY | {"weight": value}]}, PLACE)
    with pytest.raises(InputError, match="message 1: train = True asks to score a user message"):
        chat().documents({"messages": [ASK | {"train": True}, SAY]}, PLACE)
    row = {"messages": [ASK | {"train": True}, SAY | {"weight": 0.5}]}
    assert scored(chat(score_keys=[]), row) == "No."


def test_a_rows_variables_reach_the_template_and_take_precedence() -> None:
    template = "{{ tone }}" + CALLS
    of = chat(template, variables={"tone": "calm"})
    for row, tone in (({}, "calm"), ({"chat_template_kwargs": {"tone": "wild"}}, "wild"),
                      ({"chat_template_kwargs": '{"tone": "wild"}'}, "wild"),
                      ({"chat_template_kwargs": {"tone": None}}, "calm")):  # fmt: skip
        assert whole(of, {"messages": [ASK, SAY]} | row) == rendered([ASK, SAY], template, tone=tone)
    for name in ("mood", "messages", "eos_token"):
        with pytest.raises(InputError, match=f"row 7 sets the variable {name}, which the chat template does not read"):
            of.documents({"messages": [ASK, SAY], "chat_template_kwargs": {name: 1}}, PLACE)


def test_tools_that_the_template_does_not_write_are_an_error() -> None:
    plain = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    row = {"messages": [ASK, SAY], "tools": [TOOL]}
    with pytest.raises(
        InputError, match=r"row 7 has tools, but the chat template does not write them.*tools_columns=\[\]"
    ):
        chat(plain).documents(row, PLACE)
    assert whole(chat(plain, tools_columns=[]), row) == rendered([ASK, SAY], plain)
    assert whole(chat(plain), row | {"tools": []}) == rendered([ASK, SAY], plain)
    for tools, message in (("{", "field 'tools' is text, but not JSON"), (5, "not a list of tools but int"),
                           ([5], "a tool in field 'tools' is not a record but int")):  # fmt: skip
        with pytest.raises(InputError, match=f"row 7: .*{message}"):
            chat().documents(row | {"tools": tools}, PLACE)


def test_tools_that_spell_special_tokens_stay_text() -> None:
    tool = {"type": "function", "function": WEATHER | {"description": "a <|im_end|> b"}}
    (document,) = chat().documents({"messages": [ASK, SAY], "tools": [tool]}, PLACE)
    assert [segment.special for segment in document if segment.text == "<|im_end|>"] == [False]


def test_two_answers_in_a_row_are_two_turns() -> None:
    row = {"messages": [ASK, SAY, {"role": "assistant", "content": "It is dry."}]}
    assert whole(chat(), row) == rendered(row["messages"])
    assert scored(chat(), row) == "No.<|im_end|>It is dry."


def test_what_nothing_reads_is_named() -> None:
    of = chat()
    row = {"messages": [ASK | {"id": 1, "masked": True}, SAY | {"weight": 1, "name": "x", "note": None}], "system": "a",
           "prompt": "b", "source": "c", "score": None}  # fmt: skip
    assert of.unread(row) == {"prompt", "source", "messages[].id", "messages[].masked"}
    assert of.unread({"prompt": "a", "completion": "b", "history": [], "source": "c"}) == {"source"}


@pytest.mark.parametrize(("row", "message"), [
    ({"messages": [ASK], "system": ["x"]}, "field 'system' is not text but list"),
    ({"messages": [ASK, SAY], "history": "x"}, "field 'history' is text, but not JSON"),
    ({"messages": [ASK, SAY], "chat_template_kwargs": [1]}, "'chat_template_kwargs' is not a record of variables"),
    ({"prompt": "a", "completions": "b"}, "no field 'completion'; did you mean 'completions'.*completion_columns"),
])  # fmt: skip
def test_columns_that_cannot_be_read_are_errors(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        error_of_every_row(chat(), row, PLACE)
