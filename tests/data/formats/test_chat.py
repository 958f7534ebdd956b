"""The scored part of a conversation, with any template: against transformers, and against each turn alone."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import CHAT, TOKENS, data_config, error_of_every_row, files
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from pretune.core.config import ConfigError, InputError, validate
from pretune.data.formats.build import build_formatter
from pretune.data.formats.config import ChatFormat
from pretune.data.formats.formatter import Formatter
from pretune.data.formats.segments import Place, Segment, Unusable
from pretune.data.tokenizer import TRAINED_EOS, Tokenizer, load_tokenizer, train_byte_level

PLACE = Place(data_config(source=files("a.jsonl")).source, 6)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
BRACKETS = (  # no generation prompt of its own, and the end of the turn is the end of the document
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] | trim + eos_token }}{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% endif %}{% endfor %}"
)
MARKERS = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRAINING_MARKERS = LLAMA3.replace(  # the same text as LLAMA3, with the assistant's turns marked
    "{{ '<|start_header_id|>' + message['role']",
    "{% if message['role'] == 'assistant' %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% generation %}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}{% else %}"
    "{{ '<|start_header_id|>' + message['role']",
).replace("'<|eot_id|>' }}{% endfor %}", "'<|eot_id|>' }}{% endif %}{% endfor %}")
THINKING = (  # drops the reasoning of earlier turns
    "{% for message in messages %}{% set text = message['content'] %}{% if not loop.last and '</think>' in text %}"
    "{% set text = text.split('</think>')[1] %}{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + text + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>")

letters = st.text("ab <|>_\n日é", min_size=1, max_size=12).filter(str.strip)


@st.composite
def conversations(draw: st.DrawFn, spells: tuple[str, ...] = ()) -> list[dict[str, str]]:
    """Alternating turns, possibly after a system message; texts may spell the special tokens `spells`.

    Answers neither begin nor end in white space: there a whole text is split into other tokens than its parts.
    """
    texts = st.lists(letters | st.sampled_from(spells), min_size=1, max_size=3).map("".join) if spells else letters
    system = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    turns = [
        message
        for _ in range(draw(st.integers(1, 4)))
        for message in ({"role": "user", "content": draw(texts)},
                        {"role": "assistant", "content": draw(texts.map(str.strip).filter(bool))})
    ]  # fmt: skip
    return system + turns


@cache
def tokenizer(template: str | None = None) -> Tokenizer:
    """A tokenizer of bytes and the special tokens of all these templates."""
    backend = train_byte_level(iter(["a"]), 257, False)
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return Tokenizer(backend, TRAINED_EOS, "<s>", template)


@cache
def reference(template: str) -> PreTrainedTokenizerFast:
    ours = tokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=Backend.from_str(ours.backend.to_str()),
        eos_token=ours.eos,
        bos_token="<s>",
        chat_template=template,
    )


def formatter(template: str | None, own: str | None = None, **changes: Any) -> Formatter:
    tokenizer_section = {"kind": "file", "path": "x", "eos": None, "add_tokens": []}
    format = data_config(format=CHAT | {"template": template} | changes, tokenizer=tokenizer_section).format
    return build_formatter(format, tokenizer(own).template_tokens)


def ids_and_flags(segments: list[Segment], of: Tokenizer) -> tuple[list[int], list[bool]]:
    ids = of.encode_segments(segments)
    flags = [segment.scored for segment, one in zip(segments, ids, strict=True) for _ in one]
    return [token for one in ids for token in one], flags


def one_document(of: Formatter, messages: list[dict[str, str]]) -> list[Segment]:
    (document,) = of.documents({"messages": messages}, PLACE)
    return document


@pytest.mark.parametrize("template", [CHATML, LLAMA3, BRACKETS, MARKERS])
@given(messages=conversations(SPECIAL))
@settings(max_examples=40)
def test_the_scored_text_is_what_the_assistant_says(template: str, messages: list[dict[str, str]]) -> None:
    of = formatter(template)
    document = one_document(of, messages)
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    end = of.end_of_turn
    spoken = "".join(text + end for text in said)
    if template is BRACKETS:  # its turns end with eos, and the last eos is the document's, which is not text
        spoken = TRAINED_EOS.join(" " + text for text in said)
    assert "".join(segment.text for segment in document if segment.scored) == spoken
    assert document[-1].scored, "so the end of the document is"
    assert all(segment.text for segment in document)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, BRACKETS, MARKERS])
@given(messages=conversations(SPECIAL))
@settings(max_examples=25)
def test_every_turn_follows_the_very_prompt_that_generation_is_given(
    template: str, messages: list[dict[str, str]]
) -> None:
    of = formatter(template)
    ids, flags = ids_and_flags(one_document(of, messages), tokenizer())
    starts = [at for at in range(1, len(ids)) if flags[at] and not flags[at - 1]]
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(starts) == len(turns)
    for start, turn in zip(starts, turns, strict=True):
        prompt, unscored = ids_and_flags(of.render_prompt(messages[:turn]), tokenizer())
        assert prompt == ids[:start]
        assert not any(unscored)


@pytest.mark.parametrize(("template", "marked"), [(MARKERS, MARKERS), (LLAMA3, TRAINING_MARKERS)])
@given(messages=conversations())
@settings(max_examples=25)
def test_tokens_and_mask_are_those_of_transformers(template: str, marked: str, messages: list[dict[str, str]]) -> None:
    # transformers' own mask needs markers in the template; ours does without.
    theirs: Any = reference(marked).apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    ids, flags = ids_and_flags(one_document(formatter(template), messages), tokenizer())
    mask = [bool(one) for one in theirs["assistant_masks"]]
    after = len(mask) - mask[::-1].index(True)  # white space after the last turn is not scored
    assert ids == list(theirs["input_ids"])[:after]
    assert flags == mask[:after]


@given(messages=conversations(SPECIAL))
@settings(max_examples=25)
def test_what_people_type_never_becomes_a_special_token(messages: list[dict[str, str]]) -> None:
    ids, _ = ids_and_flags(one_document(formatter(LLAMA3), messages), tokenizer())
    special = [token for token in ids if token >= 257]
    plain = [dict(message, content="x") for message in messages]
    expected, _ = ids_and_flags(one_document(formatter(LLAMA3), plain), tokenizer())
    assert special == [token for token in expected if token >= 257]
    theirs = reference(LLAMA3).apply_chat_template(messages, return_dict=False, sanitize_control_tokens=True)
    assert ids == theirs


def qwen(shared_data: Path) -> Path:
    return shared_data / "tokenizers" / "qwen2.5"


def test_qwens_own_template_gives_the_tokens_of_transformers(shared_data: Path) -> None:
    config = data_config(
        format=CHAT, tokenizer={"kind": "file", "path": str(qwen(shared_data)), "eos": None, "add_tokens": []}
    )
    ours = load_tokenizer(config.tokenizer, config, shared_data)
    of = build_formatter(config.format, ours.template_tokens)
    theirs = PreTrainedTokenizerFast.from_pretrained(qwen(shared_data))
    assert of.end_of_turn == "<|im_end|>"

    @given(messages=conversations(("Hello, world! 12", "def f(x):\n    return x")))
    @settings(max_examples=40)
    def check(messages: list[dict[str, str]]) -> None:
        ids, flags = ids_and_flags(one_document(of, messages), ours)
        expected = theirs.apply_chat_template(messages, return_dict=False)
        assert ids == expected[:-1], "all but the line end that the end of the document takes the place of"
        said = [message["content"] + "<|im_end|>" for message in messages if message["role"] == "assistant"]
        assert ours.decode([one for one, flag in zip(ids, flags, strict=True) if flag], special=True) == "".join(said)
        asked = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert ids_and_flags(of.render_prompt(messages[:-1]), ours)[0] == asked

    check()


THOUGHTS = [
    {"role": "user", "content": "a"}, {"role": "assistant", "content": "hm</think>b"},
    {"role": "user", "content": "c"}, {"role": "assistant", "content": "so</think>d"},
]  # fmt: skip


def test_a_template_that_changes_earlier_turns_is_refused_or_takes_a_document_for_each() -> None:
    with pytest.raises(InputError, match=r"a\.jsonl, row 7: .* message 2 differently when others follow.*=apart"):
        one_document(formatter(THINKING), THOUGHTS)
    apart = formatter(THINKING, assistant_turns="apart")
    first, second = apart.documents({"messages": THOUGHTS}, PLACE)
    assert [segment.text for segment in first] == [
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "hm</think>b<|im_end|>"]  # fmt: skip
    assert [segment.text for segment in second] == [
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n", "so</think>d<|im_end|>"]  # fmt: skip
    assert apart.render_prompt(THOUGHTS[:3]) == second[:1]
    assert formatter(THINKING, assistant_turns="last").documents({"messages": THOUGHTS}, PLACE) == [second]


def test_names_of_fields_and_roles_differ_between_data_sets() -> None:
    here = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    there = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 1}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}]}, here[1]]
    of = formatter(CHATML)
    for row in ({"conversations": there}, {"messages": parts, "prompt": "x"}, {"messages": [*here, here[0]]}):
        assert of.documents(row, PLACE) == of.documents({"messages": here}, PLACE)


@pytest.mark.parametrize(("messages", "reason"), [
    ([], "it has no assistant turn"),
    ([("user", "a")], "it has no assistant turn"),
    ([("assistant", "a")], "it starts with the assistant"),
    ([("system", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")], "it starts with the assistant"),
    ([("user", "a"), ("assistant", " ")], "it has an empty turn"),
    ([("user", ""), ("assistant", "b")], "it has an empty turn"),
    ([("user", float("nan")), ("assistant", "b")], "it has an empty turn"),
    ([(None, "a"), ("assistant", "b")], "one of its messages has no role"),
])  # fmt: skip
def test_conversations_that_teach_nothing_are_left_out(messages: list[tuple[Any, Any]], reason: str) -> None:
    row = {"messages": [{"role": role, "content": content} for role, content in messages]}
    with pytest.raises(Unusable, match=reason):
        formatter(CHATML).documents(row, PLACE)


@pytest.mark.parametrize(("row", "message"), [
    ({"text": "a"}, r"a\.jsonl, row 7 has no field 'messages' or 'conversations' \(it has: text\)"),
    ({"messages": "hello"}, "field 'messages' is text, but not JSON"),
    ({"messages": "5"}, "field 'messages' is not a list of messages but int"),
    ({"messages": ["hello"]}, "row 7, field 'messages', message 1 is not a record with role and content but str"),
    ({"messages": [{"content": "a"}]}, r"message 1 has no 'role' or 'from' \(it has: content\)"),
    ({"messages": [{"role": "bot", "content": "a"}]}, r"message 1: unknown role 'bot' .*\+data\.format\.roles\.bot="),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "1: its content has a part that is not text"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, "message 1: its role is not text but list"),
    ({"messages": [{"role": "user", "text": "a"}]}, r"message 1 has no 'content' or 'value' \(it has: role, text\)"),
])  # fmt: skip
def test_rows_that_are_no_conversations_are_errors(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        error_of_every_row(formatter(CHATML), row, PLACE)


def test_a_template_may_refuse_a_conversation() -> None:
    alternate = (
        "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ message['content'] + eos_token }}{% endfor %}"
    )
    messages = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    with pytest.raises(Unusable, match="the chat template rejects it: roles must alternate"):
        formatter(alternate).documents({"messages": messages}, PLACE)
    with pytest.raises(InputError, match="the chat template rejects this chat: roles must alternate"):
        formatter(alternate).render_prompt(messages[:2])
    for nothing in ([], messages):
        with pytest.raises(InputError, match="there is nothing to answer"):
            formatter(CHATML).render_prompt(nothing)


@pytest.mark.parametrize(("template", "message"), [
    ("{% for message in messages %}{{ message['content'] }}", "not valid Jinja: line 1: Unexpected end of template"),
    ("{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}",
     r"does not write the assistant's text; insert message\['content'\]"),
    ("{{ messages[-1]['content'] }}", "does not write the user's text"),
    ("{{ ''.__class__.__mro__ }}", "the chat template fails: SecurityError"),
    ("{{ messages.append(1) }}", "the chat template fails: SecurityError"),
    ("{{ wrong.name }}", "the chat template fails: UndefinedError: 'wrong' is undefined"),
    ("{{ raise_exception('never') }}", "rejects a question and its answer: never"),
    (None, "the tokenizer has none; set data.format.template .one of chatml, llama3, gemma, a file"),
])  # fmt: skip
def test_templates_that_cannot_be_used_are_errors_before_any_row_is_read(template: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        formatter(template)


def test_a_prompt_that_is_not_how_the_turn_begins_is_an_error() -> None:
    odd = CHATML.replace("<|im_start|>assistant\n' }}{% endif %}", "<|im_start|>assistant\n<think>' }}{% endif %}")
    with pytest.raises(InputError, match=r"row 7: the chat template writes a prompt for message 2 that does not match"):
        one_document(formatter(odd), THOUGHTS)


def test_variables_reach_the_template() -> None:
    template = "{{ today }}" + CHATML
    (segments,) = formatter(template, variables={"today": "1 May"}).documents({"messages": THOUGHTS}, PLACE)
    assert segments[0].text.startswith("1 May<|im_start|>user")


def test_the_template_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    tokenizer(CHATML).save(tmp_path)
    config = data_config(format=CHAT, tokenizer={"kind": "file", "path": str(tmp_path), "eos": None, "add_tokens": []})
    found = load_tokenizer(config.tokenizer, config, tmp_path)
    assert found.template_tokens == tokenizer(CHATML).template_tokens
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ids, _ = ids_and_flags(build_formatter(config.format, found.template_tokens).render_prompt(THOUGHTS[:1]), found)
    assert theirs.apply_chat_template(THOUGHTS[:1], add_generation_prompt=True, return_dict=False) == ids
    # A template in the configuration takes precedence over the tokenizer's, and is the one saved.
    other = data_config(format=CHAT | {"template": LLAMA3}, tokenizer=config.tokenizer.model_dump())
    assert load_tokenizer(other.tokenizer, other, tmp_path).chat_template == LLAMA3


def test_older_files_hold_the_template_and_tokens_in_other_ways(tmp_path: Path) -> None:
    tokenizer().save(tmp_path)
    about = {"eos_token": {"content": TRAINED_EOS}, "bos_token": "<s>"}
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    for template in (CHATML, named):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(about | {"chat_template": template}))
        config = data_config(
            format=CHAT, tokenizer={"kind": "file", "path": str(tmp_path), "eos": None, "add_tokens": []}
        )
        assert load_tokenizer(config.tokenizer, config, tmp_path).chat_template == CHATML


def test_the_plain_template_suits_any_tokenizer(composed: Any, tmp_path: Path) -> None:
    mapping = composed("smoke", "data/format=chat_plain")["data"]["format"]
    of = build_formatter(validate(ChatFormat, mapping), TOKENS)
    assert of.end_of_turn == TRAINED_EOS
    (document,) = of.documents({"messages": THOUGHTS}, PLACE)
    assert "".join(segment.text for segment in document) == (
        f"<|user|>\na{TRAINED_EOS}\n<|assistant|>\nhm</think>b{TRAINED_EOS}\n<|user|>\nc{TRAINED_EOS}\n"
        "<|assistant|>\nso</think>d"
    )
    config = data_config(format=CHAT)
    with pytest.raises(ConfigError, match="the tokenizer has none"):
        load_tokenizer(config.tokenizer, config, tmp_path)
