"""Parsing the answer in a model's text: the reference system's option parser got none of these right."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import TOKENS, data_config, files

from pretune.core.config import ConfigError
from pretune.data.formats.build import build_formatter
from pretune.data.formats.documents import questions
from pretune.data.formats.problems import Question, chosen_option, final_answer

OPTIONS = ("rs . 1,500", "( 3 , 4 )", "12", "12.5 %", "none of these")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (" rs . 1,500", 0),
        (" Rs. 1500", 0),
        (" ( 3 , 4 )", 1),
        (" (3,4)", 1),
        (" 12", 2),
        (" 12.", 2),
        (" 12.00", 2),
        (" 12 days", 2),
        (" 12.5%", 3),
        (" none of these", 4),
        ("\nrationale : 3 * 4 = 12\nanswer : 12", 2),
        (" 12\nrationale : 1500 / 125", 2),
        ("answer : 1\nanswer : ( 3 , 4 )", 1),
        (" the answer is : 12", 2),
        (" b", 1),
        (" ( D )", 3),
        (" a ) rs . 1,500", 0),
        (" e.", 4),
        ("", None),
        ("\n\n", None),
        (" f", None),
        (" a lot", None),
        (" 13", None),
        (" 12 or 13", None),
        (" 3", None),
        (" 1/0", None),
    ],
)
def test_which_option_a_text_means(text, place) -> None:
    assert chosen_option(text, OPTIONS) == place


def test_an_option_that_is_a_letter_is_itself() -> None:
    assert chosen_option(" b", ("c", "a", "b", "d", "e")) == 2
    assert chosen_option(" 7", ("7 hours", "7 days", "8", "9", "10")) is None


@given(text=st.text(max_size=60), options=st.lists(st.text(max_size=12), min_size=5, max_size=5))
def test_any_text_can_be_read(text, options) -> None:
    place = chosen_option(text, options)
    assert place is None or 0 <= place < 5


@pytest.mark.parametrize(
    ("text", "number", "right"),
    [
        ("48 / 2 = 24\n#### 24", "24", True),
        ("#### 3\nno, #### 24.0", "24.0", True),
        ("#### $1,024", "1024", False),
        ("the answer is 24", None, False),
        ("####", None, False),
        ("", None, False),
    ],
)
def test_the_number_after_the_hashes_is_the_answer(text, number, right) -> None:
    question = Question([], "24", ())
    assert question.answer_in(text) == number
    assert question.is_right(number) == right


def test_questions_are_what_training_puts_before_the_answer(tmp_path, shared_data) -> None:
    source = shared_data / "instruct" / "gsm8k_train.jsonl"
    lines = source.read_text().splitlines()[:200]
    (tmp_path / "some.jsonl").write_text("\n".join(lines) + "\n")
    format = {"kind": "gsm8k", "calculations": False, "score_prompt": False}
    config = data_config(source=files(tmp_path / "some.jsonl"), format=format)
    formatter = build_formatter(config.format, TOKENS)
    asked = list(questions(config, formatter))
    assert 5 < len(asked) < 60
    rows = {json.loads(line)["question"].strip(): json.loads(line) for line in lines}
    for question in asked:
        (prompt,) = question.prompt
        row = rows[prompt.text.removeprefix("Question: ").removesuffix("\nAnswer:")]
        assert question.wanted == final_answer(row["answer"])
        assert question.is_right(question.answer_in(" " + row["answer"]))


def test_formats_without_a_right_answer_are_refused(tmp_path) -> None:
    (tmp_path / "some.jsonl").write_text('{"text": "a"}\n' * 9)
    config = data_config(source=files(tmp_path / "some.jsonl"), validation={"fraction": 0.999})
    with pytest.raises(ConfigError, match="mathqa or gsm8k"):
        next(questions(config, build_formatter(config.format, TOKENS)))
