"""The ways in which templates of well-known families differ, in templates that keep just these, against transformers.

For each: a conversation of several turns has the tokens of transformers, every turn follows the prompt that
transformers renders for it, and generation stops at the text that ends the turn.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from small_data import data_config, files
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from pretune.core.config import InputError
from pretune.data.formats.build import build_formatter
from pretune.data.formats.formatter import Formatter
from pretune.data.formats.segments import Place, Segment, Unusable
from pretune.data.tokenizer import TRAINED_EOS, Tokenizer, train_byte_level

PLACE = Place(data_config(source=files("a.jsonl")).source, 6)
SPECIAL = ("<s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<start_of_turn>",
           "<end_of_turn>", "[INST]", "[/INST]")  # fmt: skip

PHI3 = (  # EOS ends the conversation, not each turn
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI3_FIRST = (  # the user's turn ends in the assistant's header; no generation prompt
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|user|>\n' + m.content + '<|end|>\n<|assistant|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
)  # fmt: skip
ZEPHYR = (  # the generation prompt is written inside the loop, after the last message
    "{% for m in messages %}\n{{ '<|' + m.role + '|>\n' + m.content + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
GEMMA = (  # no system message, roles alternate, another name for the assistant, trimmed texts
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)  # fmt: skip
LLAMA2 = (  # the system message inside the first question, EOS after each answer, no generation prompt
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>' + messages[0].content + '\n' %}{% else %}{% set rest = messages %}"
    "{% set system = '' %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)  # fmt: skip
MISTRAL3 = (  # the system message inside the last question, so that it moves
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = messages[0].content %}{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if m.role == 'user' %}"
    "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}{% else %}{{ ' ' + m.content | trim + eos_token }}"
    "{% endif %}{% endfor %}"
)  # fmt: skip
QWEN3 = (  # thinking before the last question is dropped, and the last answer has some even where there is none
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)  # fmt: skip
SMOLLM2 = (  # a system message of its own where there is none
    "{% for m in messages %}{% if loop.first and messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are SmolLM.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
R1 = (  # thinking is dropped from every answer, and the prompt opens it
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{% else %}"
    "{{ '<|assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)

SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [{"role": role, "content": text} for role, text in
        (("user", "Hi"), ("assistant", "Ho."), ("user", "And?"), ("assistant", "So."), ("user", "Go"),
         ("assistant", "No."))]  # fmt: skip


@cache
def tokenizer() -> Tokenizer:
    backend = train_byte_level(iter(["a"]), 257, False)
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return Tokenizer(backend, TRAINED_EOS, "<s>", None)


@cache
def reference() -> PreTrainedTokenizerFast:
    backend = Backend.from_str(tokenizer().backend.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=TRAINED_EOS, bos_token="<s>")


def formatter(template: str, **changes: Any) -> Formatter:
    section = {"kind": "file", "path": "x", "eos": None, "add_tokens": []}
    config = data_config(format={"kind": "chat", "template": template} | changes, tokenizer=section)
    return build_formatter(config.format, tokenizer().template_tokens)


def ids(segments: list[Segment]) -> list[int]:
    return [token for one in tokenizer().encode_segments(segments) for token in one]


def theirs(messages: list[dict[str, str]], template: str, asked: bool = False, **variables: Any) -> list[int]:
    found: Any = reference().apply_chat_template(
        messages, chat_template=template, add_generation_prompt=asked, return_dict=False, **variables
    )
    return list(found)


def texts(document: list[Segment]) -> list[str]:
    """The scored turns, each as one text."""
    turns: list[str] = []
    for before, segment in zip([None, *document], document, strict=False):
        if segment.scored and before is not None and before.scored:
            turns[-1] += segment.text
        elif segment.scored:
            turns.append(segment.text)
    return turns


@pytest.mark.parametrize(("template", "talk", "end"), [
    (PHI3, [SYSTEM, *TALK], "<|end|>"),
    (PHI3_FIRST, TALK, "<|end|>"),
    (ZEPHYR, [SYSTEM, *TALK], TRAINED_EOS),
    (GEMMA, TALK, "<end_of_turn>"),
    (LLAMA2, [SYSTEM, *TALK], TRAINED_EOS),
    (MISTRAL3, TALK, TRAINED_EOS),
    (SMOLLM2, TALK, "<|im_end|>"),
    (SMOLLM2, [SYSTEM, *TALK], "<|im_end|>"),
])  # fmt: skip
def test_several_turns_are_as_transformers_renders_them(template: str, talk: list[dict[str, str]], end: str) -> None:
    of = formatter(template)
    assert of.end_of_turn == end
    (document,) = of.documents({"messages": talk}, PLACE)
    ours, expected = [*ids(document), tokenizer().eos_id], theirs(talk, template)
    newline = tokenizer().encode("\n")
    # EOS stands where the template writes it after the last turn, or else in place of the line end there.
    while expected[-1:] in (newline, [tokenizer().eos_id]):
        expected.pop()
    assert ours == [*expected, tokenizer().eos_id]
    answers = [number for number, message in enumerate(talk) if message["role"] == "assistant"]
    said = [text.removesuffix(end).strip() for text in texts(document)]
    assert said == [talk[number]["content"] for number in answers]
    for number in answers:
        prompt = ids(of.render_prompt(talk[:number]))
        assert prompt == ours[: len(prompt)]
        if template not in (PHI3_FIRST, LLAMA2, MISTRAL3):  # which have no generation prompt
            assert prompt == theirs(talk[:number], template, asked=True)


NUMBERED = SMOLLM2.replace("m.role + '\n'", "m.role ~ loop.index ~ '\n'").replace(
    "<|im_start|>assistant\n' }}", "<|im_start|>assistant' ~ (messages | length + 1) ~ '\n' }}"
)
"""What it writes for a message depends on how many came before, so that no exchange can be rendered without them."""


@pytest.mark.parametrize("template", [PHI3, GEMMA, SMOLLM2, LLAMA2, NUMBERED])
@pytest.mark.parametrize("num_exchanges", [1, 2, 3, 4, 9])
def test_a_long_chat_is_cut_where_its_beginnings_are(template: str, num_exchanges: int) -> None:
    talk = [one | {"content": f"{one['content']} {number}"} for number, one in enumerate(TALK * 3)][: 2 * num_exchanges]
    of = formatter(template)
    (document,) = of.documents({"messages": talk}, PLACE)
    text, at = "".join(segment.text for segment in document), 0
    for number in range(2, len(talk) + 1, 2):
        prompt = "".join(one.text for one in of.render_prompt(talk[: number - 1]))
        (beginning,) = of.documents({"messages": talk[:number]}, PLACE)
        ours = "".join(one.text for one in beginning)
        assert text.startswith(ours)
        assert ours.startswith(prompt)
        assert len(prompt) > at
        at = len(ours)
    assert [one.removesuffix(of.end_of_turn).strip() for one in texts(document)] == [
        one["content"] for one in talk[1::2]
    ]
    assert [one.scored for one in document] == [False, True] * num_exchanges


def test_a_single_turn_is_cut_like_the_last_of_several() -> None:
    (document,) = formatter(PHI3).documents({"messages": TALK[:2]}, PLACE)
    assert [segment.text for segment in document] == ["<|user|>\nHi<|end|>\n<|assistant|>\n", "Ho.<|end|>"]


def test_what_a_template_refuses_is_left_out() -> None:
    with pytest.raises(Unusable, match="rejects it: System role not supported"):
        formatter(GEMMA).documents({"messages": [SYSTEM, *TALK]}, PLACE)
    with pytest.raises(Unusable, match="rejects it: Conversation roles must alternate"):
        formatter(GEMMA).documents({"messages": [*TALK[:2], TALK[1]]}, PLACE)


@pytest.mark.parametrize("turns", ["together", "apart"])
def test_a_system_message_that_an_answer_removes_is_an_error(turns: str) -> None:
    of, talk = formatter(MISTRAL3, assistant_turns=turns), [SYSTEM, *TALK]
    assert "Be brief." in reference().decode(theirs(talk[:2], MISTRAL3))
    assert "Be brief." not in reference().decode(theirs(talk, MISTRAL3))
    with pytest.raises(InputError, match="row 7: the chat template writes a chat differently once it is answered"):
        of.documents({"messages": talk}, PLACE)


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}])
def test_thinking_that_is_dropped_takes_a_document_for_each_turn(variables: dict[str, bool]) -> None:
    talk = [
        one | ({"reasoning_content": "" if variables else "hm"} if one["role"] == "assistant" else {}) for one in TALK
    ]
    with pytest.raises(InputError, match="message 2 differently when others follow"):
        formatter(QWEN3, variables=variables).documents({"messages": talk}, PLACE)
    of = formatter(QWEN3, variables=variables, assistant_turns="apart")
    for number, document in zip((2, 4, 6), of.documents({"messages": talk}, PLACE), strict=True):
        assert [*ids(document), 10] == [*theirs(talk[:number], QWEN3, **variables)[:-1], 10]
        assert ids(document[:-1]) == theirs(talk[: number - 1], QWEN3, asked=True, **variables)


def test_an_answer_that_cannot_follow_the_prompt_is_an_error() -> None:
    with pytest.raises(InputError, match=r"prompt for message 2 that does not match how it begins.*<think>"):
        formatter(R1).documents({"messages": TALK}, PLACE)
    asks_plainly = R1.replace("<think>\n", "")
    (document,) = formatter(asks_plainly).documents(
        {"messages": [TALK[0], TALK[1] | {"content": "hm</think>Ho."}]}, PLACE
    )
    assert texts(document) == ["Ho."]
