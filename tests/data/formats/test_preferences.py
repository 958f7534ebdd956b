"""Preferences in the forms that data sets use, and unusable ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from small_data import TOKENS, byte_tokenizer, data_config, files, write_lines

from pretune.core.config import ConfigError, InputError
from pretune.data.formats.build import build_formatter
from pretune.data.formats.config import PreferenceFormat
from pretune.data.formats.preferences import sides
from pretune.data.formats.segments import Place, Unusable
from pretune.data.shards import prepare

PLACE = Place(data_config(source=files("a.jsonl")).source, 6)
USER = {"role": "user", "content": "Name a fruit."}
SIDES = ({"instruction": "Name a fruit.", "output": "Pear."}, {"instruction": "Name a fruit.", "output": "No."})
PREFERENCE = {"kind": "preference", "template": {"kind": "instruction", "preamble": True, "score_prompt": False}}
PAIRS = {"mode": "pairs", "too_long": "drop", "isolate": True}
CHAT = {
    "kind": "chat", "columns": ["messages"], "role_keys": ["role"], "content_keys": ["content"],
    "roles": {"system": "system", "user": "user", "assistant": "assistant"}, "variables": {}, "assistant_turns": "last",
    "template": "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
}  # fmt: skip


def template(**section: Any) -> Any:
    format = data_config(format={"kind": "preference", "template": section}, packing=PAIRS).format
    assert isinstance(format, PreferenceFormat)
    return format.template


INSTRUCTION, CONVERSATION = template(**PREFERENCE["template"]), template(**CHAT)  # type: ignore[arg-type]


def says(text: str, role: str = "assistant") -> dict[str, str]:
    return {"role": role, "content": text}


def written_by(format: Any, row: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Both sides of a row, as rows of the format that renders them."""
    formatter = build_formatter(format, TOKENS)
    return tuple(formatter.as_row(side) for side in sides(row, PLACE))


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
    assert written_by(INSTRUCTION, row) == SIDES
    completion = template(kind="prompt_completion", prompt="ask", completion="say", score_prompt=False)
    expected = tuple({"ask": side["instruction"], "say": side["output"]} for side in SIDES)
    assert written_by(completion, row) == expected
    expected = tuple({"messages": [USER, says(side["output"])]} for side in SIDES)
    assert written_by(CONVERSATION, row) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "its sides are equal"),
        ({"chosen": [USER, says("b")], "rejected": [USER, says("b")]}, "its sides are equal"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "one of its sides is empty"),
        ({"chosen": [USER, says("b")], "rejected": [USER]}, "one of its sides is empty"),
        ({"prompt": " ", "chosen": "b", "rejected": "c"}, "its prompt is empty"),
        ({"chosen": [says("b")], "rejected": [says("c")]}, "its prompt is empty"),
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
        (
            {"prompt": "a", "chosen": 3, "rejected": "c"},
            "field 'chosen' is neither text nor a list",
        ),
        ({"prompt": "a", "chosen": ["b"], "rejected": "c"}, "field 'chosen', message 1 is not a record"),
        ({"chosen": [USER, {"role": "assistant"}], "rejected": [USER]}, "field 'chosen', message 2 needs both"),
    ],
)
def test_a_row_that_is_no_preference_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        written_by(INSTRUCTION, row)


def test_only_the_answers_and_their_ends_are_scored_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    pair = {"prompt": "Name a fruit.", "chosen": "Pear.", "rejected": "No."}
    rows = [pair, pair | {"rejected": "Pear."}, pair | {"chosen": ""}, pair | {"prompt": "Another."}]
    other = write_lines(tmp_path / "b.jsonl", [pair])
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
        template(**CHAT | {"assistant_turns": "together"})
