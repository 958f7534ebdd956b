"""Multiple choice in the layouts of data sets on the hub: the choices, the right one, and the prompt."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import TOKENS, data_config, files

from pretune.core.config import ConfigError, InputError
from pretune.data.formats.build import build_formatter
from pretune.data.formats.formatter import Formatter
from pretune.data.formats.segments import Absent, Place, Unusable

PLACE = Place(data_config(source=files("a.jsonl")).source, 6)


def formatter(**keys: Any) -> Formatter:
    section = {"kind": "multiple_choice", "name": "quiz", **keys}
    return build_formatter(data_config(format=section).format, TOKENS)


AI2 = {"question": "Which is warm?", "choices": {"text": ["Ice", "Fire", "Snow"], "label": ["1", "2", "3"]},
       "answerKey": "2"}  # fmt: skip
OPENBOOK = {"question": "Which is warm?", "choices": [{"text": "Ice", "label": "A"}, {"text": "Fire", "label": "B"},
            {"text": "Snow", "label": "C"}], "answerKey": "B"}  # fmt: skip
HELLASWAG = {"question": "Which is warm?", "choices": ["Ice", "Fire", "Snow"], "label": "1"}
PIQA = {"question": "Which is warm?", "sol1": "Ice", "sol2": "Fire", "sol3": "Snow", "label": 1.0}
TEXT = {"question": "Which is warm?", "choices": '["Ice", "Fire", "Snow"]', "answer": "Fire"}
FROM_ONE = HELLASWAG | {"label": 2}
LAYOUTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (AI2, {"answer": "answerKey", "answer_is": "label"}),
    (OPENBOOK, {"answer": "answerKey", "answer_is": "label"}),
    (OPENBOOK, {"answer": "answerKey", "answer_is": "letter"}),
    (HELLASWAG, {"answer": "label", "answer_is": "index_from_0"}),
    (FROM_ONE, {"answer": "label", "answer_is": "index_from_1"}),
    (PIQA, {"choices": ["sol1", "sol2", "sol3"], "answer": "label", "answer_is": "index_from_0"}),
    (TEXT, {"answer_is": "text"}),
]


@pytest.mark.parametrize(("row", "keys"), LAYOUTS)
def test_every_layout_is_the_same_question(row: dict[str, Any], keys: dict[str, Any]) -> None:
    lettered = formatter(**keys)
    problem = lettered.problem(row, PLACE)
    assert problem.prompt == "Question: Which is warm?\nA. Ice\nB. Fire\nC. Snow\nAnswer:"
    assert (problem.options, problem.correct) == ((" A", " B", " C"), 1)
    (document,) = lettered.documents(row, PLACE)
    assert [(part.text, part.scored) for part in document] == [(problem.prompt, False), (" B", True)]
    plain = formatter(**keys, template="{question}", reply="text").problem(row, PLACE)
    assert (plain.prompt, plain.options, plain.correct) == ("Which is warm?", (" Ice", " Fire", " Snow"), 1)
    text_alone = formatter(template="{question}", reply="text")
    assert text_alone.prompt({"question": row["question"]}, PLACE)[0].text == plain.prompt
    question = lettered.question(row, PLACE)
    assert question.prompt == lettered.prompt(row, PLACE)
    for said, right in ((" B", True), (" b. Fire", True), (" Fire", True), (" C", False), (" dragons", False)):
        assert question.is_right(question.answer_in(said)) == right


@pytest.mark.parametrize("count", [2, 7, 26, 40])
def test_any_number_of_choices(count: int) -> None:
    row = {"question": "Which?", "choices": [f"thing {n}" for n in range(count)], "answer": count - 1}
    keys = {"answer_is": "index_from_0"}
    assert len(formatter(**keys, template="{question}", reply="text").problem(row, PLACE).options) == count
    if count > 26:
        with pytest.raises(Unusable, match="more than 26 choices"):
            formatter(**keys).documents(row, PLACE)
    else:
        assert formatter(**keys).problem(row, PLACE).options[-1] == f" {'ABCDEFGHIJKLMNOPQRSTUVWXYZ'[count - 1]}"


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=9, unique_by=str.strip), st.data())
def test_the_right_choice_is_found_by_index_letter_and_text(texts: list[str], data: st.DataObject) -> None:
    right = data.draw(st.integers(0, len(texts) - 1))
    row = {"question": "{choices}?", "choices": texts}
    for kind, answer in (("index_from_0", right), ("letter", "abcdefghi"[right]), ("text", texts[right])):
        problem = formatter(answer_is=kind).problem(row | {"answer": answer}, PLACE)
        assert problem.correct == right
        assert problem.prompt.startswith("Question: {choices}?\nA. ")


@pytest.mark.parametrize(("changes", "fault"), [
    ({"choices": ["one"]}, "fewer than two"),
    ({"choices": ["one", ""]}, "is empty"),
    ({"choices": ["one", None]}, "is empty"),
    ({"choices": []}, "fewer than two"),
    ({"choices": None}, "no choices"),
    ({"answer": "D"}, "none of its choices"),
    ({"answer": ""}, "is empty"),
    ({"answer": None}, "no answer"),
])  # fmt: skip
def test_rows_without_a_choice_are_left_out(changes: dict[str, Any], fault: str) -> None:
    row = {"question": "Which?", "choices": ["one", "two", "three"], "answer": "A"} | changes
    with pytest.raises(Unusable, match=fault):
        formatter().documents(row, PLACE)
    with pytest.raises(Absent):
        formatter().documents({"question": "Which?"}, PLACE)


@pytest.mark.parametrize(("changes", "fault"), [
    ({"choices": 3}, "no list of choices"),
    ({"choices": "a, b"}, "not JSON"),
    ({"choices": {"text": ["a", "b"], "label": ["A"]}}, "2 texts, but 1 labels"),
    ({"choices": [["a"], ["b"]]}, "is not text"),
])  # fmt: skip
def test_what_is_no_list_of_choices_is_an_error(changes: dict[str, Any], fault: str) -> None:
    row = {"question": "Which?", "choices": ["one", "two"], "answer": "A"} | changes
    with pytest.raises(InputError, match=fault):
        formatter().documents(row, PLACE)
    with pytest.raises(InputError, match="is no number"):
        formatter(answer_is="index_from_0").documents(row | {"choices": ["a", "b"]}, PLACE)


@pytest.mark.parametrize(("keys", "fault"), [
    ({"template": "{choices}"}, r"\{question\} once"),
    ({"template": "{question}"}, "has no letters"),
    ({"template": "{question}{choices}Answer: "}, "ends with a space"),
    ({"name": "val_other"}, "group of other metrics"),
    ({"name": "My quiz"}, "name"),
])  # fmt: skip
def test_keys_that_contradict_each_other_are_refused(keys: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        formatter(**keys)
