"""Parsing the answer in a model's text: the reference system's option parser got none of these right."""

from __future__ import annotations

import json
import re

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
        ("#### 24.0", "24.0", True),
        ("#### 3\nno, #### 24.0", "3", False),
        ("24\n#### 24\n\nQuestion: What is 8 + 9?\nAnswer: 17\n#### 17", "24", True),
        ("#### many\nQuestion: What is 12 + 12?\nAnswer: #### 24", None, False),
        ("#### Step 1: 12 of them\n#### 24", "24", True),
        ("####\n24", "24", True),
        ("#### 24,5", None, False),
        ("#### 24-25", None, False),
        ("#### 24 1/2", None, False),
        ("#### 2**4", None, False),
        ("#### 24:1", None, False),
        ("#### 24, as said", "24", True),
        ("#### -24", "-24", False),
        ("#### 48/2", "48/2", True),
        ("#### \\frac{48}{2}", "48/2", True),
        ("#### 1{,}024", "1024", False),
        ("#### \N{MINUS SIGN}$24", "-24", False),
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


FORMS = [
    "{}", "**{}**", "${}", "\\${}", "{}.0", "{}.", "{}%", "{}\\%", "{} dollars", "{}\\text{{ dollars}}", "= {}",
    "x = {}", "\\boxed{{{}}}", "$\\boxed{{{}}}$", "Answer: {}", "The final answer is ${}.", "( {} )", "`{}`",
    "\N{EURO SIGN} {}",
]  # fmt: skip


@given(st.integers(-(10**7), 10**7), st.sampled_from(FORMS), st.booleans())
def test_a_number_is_read_in_any_of_its_forms(value: int, form: str, grouped: bool) -> None:
    question = Question([], str(value), ())
    written = form.format(f"{value:,}" if grouped else value)
    assert question.is_right(question.answer_in(f"So it is.\n#### {written}"))
    for wrong in (value + 1, -value if value else 1, value * 10 + 1):
        assert not question.is_right(question.answer_in(f"#### {form.format(wrong)}"))


def strict_match(text: str, gold: str) -> bool:
    """lm-evaluation-harness's gsm8k, filter `strict-match`, by its description: the first match, compared as text."""
    found = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return found is not None and _as_text(found[1]) == _as_text(gold)


def flexible_extract(text: str, gold: str) -> bool:
    """The same with the filter `flexible-extract`: the last number of the text."""
    found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    return bool(found) and _as_text(max(found[-1], key=len)) == _as_text(gold)


def _as_text(answer: str) -> str:
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):
        answer = re.sub(ignored, "", answer)
    return answer.lower()


@given(st.integers(-(10**6), 10**6), st.integers(-30, 30), st.booleans(), st.booleans())
def test_where_the_harness_finds_a_right_answer_so_do_we(value: int, off: int, grouped: bool, runs_on: bool) -> None:
    gold = f"#### {value}"
    said = f"{value + off // 20:,}" if grouped else str(value + off // 20)
    text = f"It is {value} in all.\n#### {said}" + "\n\nQuestion: And 3 + 4?\nAnswer: #### 7" * runs_on
    question = Question([], str(value), ())
    assert question.is_right(question.answer_in(text)) == strict_match(text, gold)
    if not runs_on:
        assert flexible_extract(text, gold) == strict_match(text, gold)


def test_what_the_harness_reads_otherwise() -> None:
    """`strict-match` wants the number right after the hashes; `flexible-extract` takes any last number."""
    question = Question([], "28", ())
    for text in ("#### **28**", "#### $28", "#### \\boxed{28}"):
        assert (question.is_right(question.answer_in(text)), strict_match(text, "#### 28")) == (True, False)
    text = "#### 28.0"  # equal as a number, not as text
    assert (question.is_right(question.answer_in(text)), strict_match(text, "#### 28")) == (True, False)
    text = "There are 28"
    assert (question.is_right(question.answer_in(text)), flexible_extract(text, "#### 28")) == (False, True)


def test_every_published_answer_is_read_as_the_harness_does(shared_data) -> None:
    answers = [
        json.loads(line)["answer"] for line in (shared_data / "instruct" / "gsm8k_train.jsonl").read_text().splitlines()
    ]
    assert len(answers) > 7000
    assert all(strict_match(answer, f"#### {final_answer(answer)}") for answer in answers)


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
    with pytest.raises(ConfigError, match="gsm8k or multiple_choice"):
        next(questions(config, build_formatter(config.format, TOKENS)))
