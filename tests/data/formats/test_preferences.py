"""Preferences in the forms that data sets use, and unusable ones."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from small_data import TOKENS, byte_tokenizer, data_config, error_of_every_row, files, write_lines

from pretune.core.config import ConfigError, InputError
from pretune.data.formats.build import build_formatter
from pretune.data.formats.segments import Place, Unusable
from pretune.data.shards import prepare

PLACE = Place(data_config(source=files("a.jsonl")).source, 6)
USER = {"role": "user", "content": "Name a fruit."}
PREFERENCE = {"kind": "preference", "template": {"kind": "instruction", "preamble": True, "score_prompt": False}}
PAIRS = {"mode": "pairs", "too_long": "drop", "isolate": True}
CHAT = {
    "kind": "chat", "columns": ["messages"], "role_keys": ["role"], "content_keys": ["content"],
    "roles": {"system": "system", "user": "user", "assistant": "assistant"}, "variables": {}, "assistant_turns": "last",
    "template": "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
}  # fmt: skip


INSTRUCTION: dict[str, Any] = PREFERENCE["template"]  # type: ignore[assignment]
COMPLETION = {"kind": "prompt_completion", "prompt": "ask", "completion": "say", "score_prompt": False}
TOOLS = {  # ChatML with calls, as objects
    **CHAT, "template": "{{ tone }}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}:"
    "{{ c.function.arguments | tojson }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{# tools #}",
}  # fmt: skip


def says(text: str, role: str = "assistant") -> dict[str, str]:
    return {"role": role, "content": text}


def written_by(format: dict[str, Any], row: dict[str, Any], **names: Any) -> tuple[tuple[str, str], ...]:
    """The prompt and the answer of both sides of a row."""
    config = data_config(format=PREFERENCE | {"template": format} | names, packing=PAIRS).format
    documents = build_formatter(config, TOKENS).documents(row, PLACE)
    return tuple(
        ("".join(one.text for one in document if not one.scored), "".join(one.text for one in document if one.scored))
        for document in documents
    )


def asked(template: dict[str, Any], prompt: str) -> str:
    """A prompt as the format of the preceding instruction tuning puts it."""
    formatter = build_formatter(data_config(format=template).format, TOKENS)
    (segment,) = formatter.render_prompt([says(prompt, "user")])
    return segment.text


TALK = [says("Be brief.", "system"), USER, says("Pear."), says("And another?", "user")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Name a fruit.", "chosen": "Pear.", "rejected": "No.", "source": "x"},
        {"chosen": [USER, says("Pear.")], "rejected": [USER, says("No.")], "score_chosen": 8.0},
        {"prompt": [USER], "chosen": [says("Pear.")], "rejected": [says("No.")]},
        {"prompt": "Name a fruit.", "chosen": [USER, says("Pear.")][1:], "rejected": [says("No.")]},
        {"prompt": None, "chosen": [USER, says("Pear.")], "rejected": [USER, says("No.")]},
    ],
)
def test_texts_and_messages_are_the_same_pair(row: dict[str, Any]) -> None:
    for template, end in ((INSTRUCTION, ""), (COMPLETION, ""), (CHAT, "</s>")):
        prompt = asked(template, "Name a fruit.")
        assert written_by(template, row) == ((prompt, f"Pear.{end}"), (prompt, f"No.{end}"))


def test_the_prompt_comes_once_however_often_the_row_has_it() -> None:
    # trl's definition of the prompt: what both sides begin with, after the prompt column.
    talk = [says("Be brief.", "system"), USER, says("Pear."), says("And a root?", "user")]
    long = "Name the first month of the year."
    for prompt, chosen, rejected, expected in (
        (talk[3]["content"], [*talk, says("Beet.")], [*talk, says("Oak.")], talk),
        (talk, [*talk, says("Beet.")], [*talk, says("Oak.")], talk),
        (talk[1:], [*talk, says("Beet.")], [*talk, says("Oak.")], talk),
        (talk[:1], [*talk[1:], says("Beet.")], [*talk[1:], says("Oak.")], talk),
        (json.dumps(talk), json.dumps([says("Beet.")]), json.dumps([says("Oak.")]), talk),
        (long, f"{long} Beet.", f"{long}\nOak.", [says(long, "user")]),
        (None, "\n\nHuman: Hi\n\nAssistant: Hm?\n\nHuman: Go\n\nAssistant: Beet.",
         "\n\nHuman: Hi\n\nAssistant: Hm?\n\nHuman: Go\n\nAssistant: Oak.",
         [says("Hi", "user"), says("Hm?"), says("Go", "user")]),
        ("\n\nHuman: Hi\n\nAssistant:", "Beet.", "Oak.", [says("Hi", "user")]),
    ):  # fmt: skip
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        before = "".join(f"<{one['role']}>{one['content']}</s>" for one in expected) + "<assistant>"
        assert written_by(CHAT, row) == ((before, "Beet.</s>"), (before, "Oak.</s>"))


def test_an_answer_may_begin_as_a_short_prompt_does() -> None:
    row = {"prompt": "Hello", "chosen": "Hello! How are you?", "rejected": "Hello."}
    assert [answer for _, answer in written_by(INSTRUCTION, row)] == ["Hello! How are you?", "Hello."]
    row = {"prompt": "Name a nice fruit.", "chosen": "Name a nice fruit. Well: pear.", "rejected": "No."}
    assert [answer for _, answer in written_by(INSTRUCTION, row)] == [row["chosen"], "No."]


def test_columns_beside_a_pair_hold_in_a_chat() -> None:
    row = {"system": "Be brief.", "question": "Where?", "chosen": {"from": "gpt", "value": "Here."}, "rejected": 4}
    names = {"role_keys": ["from"], "content_keys": ["value"]}
    before = "<system>Be brief.</s><user>Where?</s><assistant>"
    assert written_by(CHAT, row, **names) == ((before, "Here.</s>"), (before, "4</s>"))
    with pytest.raises(InputError, match="row 7 has a system, for which Alpaca's prompt has no place"):
        written_by(INSTRUCTION, row, **names)
    assert written_by(INSTRUCTION | {"refuse_columns": []}, row, **names)[0] == (asked(INSTRUCTION, "Where?"), "Here.")
    row = {"prompt": [USER], "chosen": [says("", "assistant") | {"tool_calls": [{"name": "f", "arguments": "{}"}]}],
           "rejected": [says("No.")], "chat_template_kwargs": {"tone": "!"}, "tools": [{"name": "f"}]}  # fmt: skip
    assert written_by(TOOLS, row)[0] == ("!<user>Name a fruit.</s><assistant>", "f:{}</s>")
    formatter = build_formatter(data_config(format=PREFERENCE | {"template": TOOLS}, packing=PAIRS).format, TOKENS)
    assert formatter.unread(row | {"margin": 2.0, "source": None}) == {"margin"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "its sides are equal"),
        ({"chosen": [USER, says("b")], "rejected": [USER, says("b")]}, "its sides are equal"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "one of its sides is empty"),
        ({"chosen": [USER, says("b")], "rejected": [USER]}, "one of its sides is empty"),
        ({"prompt": " ", "chosen": "b", "rejected": "c"}, "its prompt is empty"),
        ({"chosen": [says("b")], "rejected": [says("c")]}, "it has no prompt"),
        ({"prompt": None, "chosen": "b", "rejected": "c"}, "it has no prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "it has no rejected"),
        ({"prompt": "a", "chosen": float("nan"), "rejected": "c"}, "it has no chosen"),
        ({"prompt": "a", "chosen": [says("b") | {"train": False}], "rejected": "c"}, "is not to be scored"),
        ({"chosen": [*TALK, says("c")], "rejected": [*TALK, says("d")]}, "its prompt is not a single"),
        ({"chosen": [*TALK[:2], says("c")], "rejected": [*TALK[:2], says("d")]}, "its prompt is not a single"),
        ({"chosen": [USER, says("c"), USER], "rejected": [USER, says("d")]}, "more than the assistant"),
    ],
)
def test_what_is_left_out_and_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        written_by(INSTRUCTION, row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "a.jsonl, row 7 has no field 'rejected'"),
        ({"prompt": "a", "chosen": "b", "reject": "c"}, "did you mean 'reject'"),
        ({"chosen": "b", "rejected": "c"}, "no field 'prompt'"),
        ({"prompt": "a", "chosen": b"3", "rejected": "c"}, "field 'chosen' is not text but bytes"),
        ({"prompt": "a", "chosen": ["b"], "rejected": "c"}, "field 'chosen', message 1 is not a record"),
        ({"chosen": [USER, {"role": "assistant"}], "rejected": [USER]}, "field 'chosen', message 2 has no 'content'"),
    ],
)
def test_a_row_that_is_no_preference_is_named(row: dict[str, Any], message: str) -> None:
    formatter = build_formatter(data_config(format=PREFERENCE, packing=PAIRS).format, TOKENS)
    with pytest.raises(InputError, match=message):
        error_of_every_row(formatter, row, PLACE)


def test_only_the_answers_and_their_ends_are_scored_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    pair = {"prompt": "Name a fruit.", "chosen": "Pear.", "rejected": "No."}
    rows = [pair, pair | {"rejected": "Pear."}, pair | {"chosen": ""}, pair | {"prompt": "Another."}]
    other = write_lines(tmp_path / "b.jsonl", [pair | {"prompt": "One more."}])
    config = data_config(
        source=files(write_lines(tmp_path / "a.jsonl", rows)), format=PREFERENCE, sequence_length=400,
        validation={"source": files(other), "fraction": None},
        packing=PAIRS,
    )  # fmt: skip
    data = prepare(config, byte_tokenizer(), tmp_path).train
    assert data.num_documents == 4
    assert data.skipped == Counter({"its sides are equal": 1, "one of its sides is empty": 1})
    tokens, scored = data.read(0, data.num_tokens)
    assert scored is not None
    decoded, begin = [], 0
    for end in data.document_ends:
        kept = tokens[begin:end][scored[begin:end]]
        assert kept[-1] == data.eos_id
        decoded.append(byte_tokenizer().decode(kept.tolist()))
        begin = int(end)
    assert decoded == ["Pear.", "No."] * 2


def test_a_chat_template_holds_conversations_and_only_the_last_answer_is_scored() -> None:
    row = {"chosen": [*TALK, says("Plum.")], "rejected": [*TALK, says("I will not.")]}
    format = data_config(format={"kind": "preference", "template": CHAT}, packing=PAIRS).format
    formatter = build_formatter(format, byte_tokenizer().template_tokens)
    written = formatter.documents(row, PLACE)
    beginning = "<system>Be brief.</s><user>Name a fruit.</s><assistant>Pear.</s><user>And another?</s><assistant>"
    for document, answer in zip(written, ("Plum.", "I will not."), strict=True):
        assert "".join(segment.text for segment in document if not segment.scored) == beginning
        assert "".join(segment.text for segment in document if segment.scored).startswith(answer)
    # The prompt at generation is the text before the answer in training.
    asked = formatter.render_prompt([{"role": "user", "content": "Name a fruit."}])
    assert "".join(segment.text for segment in asked) == "<user>Name a fruit.</s><assistant>"


def test_a_chat_template_must_score_the_last_answer_only() -> None:
    with pytest.raises(ConfigError, match="assistant_turns must be last"):
        data_config(format=PREFERENCE | {"template": CHAT | {"assistant_turns": "together"}}, packing=PAIRS)
