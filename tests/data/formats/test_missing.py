"""What is missing from a row, and what is a text: the same in every format and column."""

from __future__ import annotations

import datetime
import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import MATHQA, TOKENS, byte_tokenizer, data_config, files, write_lines

from pretune.core.config import InputError
from pretune.data.formats.build import build_formatter
from pretune.data.formats.documents import questions, training_texts
from pretune.data.formats.segments import ColumnCheck, Place, Unusable
from pretune.data.shards import prepare

PLACE = Place(data_config(source=files("a.jsonl")).source, 6)
PAIRS = {"mode": "pairs", "too_long": "drop", "isolate": True}
CHAT = {
    "kind": "chat",
    "template": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
}
PROBLEM = {
    "Problem": "1 + 1 ?",
    "Rationale": "it is 2",
    "options": "a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) 5",
    "correct": "b",
}
FORMATS: list[tuple[dict[str, Any], dict[str, Any], set[str]]] = [  # a format, a row, the fields a row can do without
    ({"kind": "text"}, {"text": "a"}, set()),
    ({"kind": "prompt_completion"}, {"prompt": "a", "completion": "b"}, set()),
    ({"kind": "instruction"}, {"instruction": "a", "input": "b", "output": "c"}, {"input"}),
    ({"kind": "gsm8k"}, {"question": "a", "answer": "b\n#### 1"}, set()),
    (MATHQA | {"rationale": "after"}, PROBLEM, {"Rationale"}),
    (CHAT, {"prompt": "a", "input": "b", "completion": "c", "system": "d"}, {"input", "system"}),
    ({"kind": "preference", "template": CHAT | {"assistant_turns": "last"}},
     {"prompt": "a", "chosen": "b", "rejected": "c", "system": "d"}, {"system"}),
]  # fmt: skip


def documents(format: dict[str, Any], row: dict[str, Any]) -> list[str]:
    packing = {"packing": PAIRS} if format["kind"] == "preference" else {}
    formatter = build_formatter(data_config(format=format, **packing).format, TOKENS)
    return ["".join(segment.text for segment in segments) for segments in formatter.documents(row, PLACE)]


@pytest.mark.parametrize(("format", "row", "spare"), FORMATS)
@pytest.mark.parametrize("nothing", [None, math.nan, "", " \n\t", Decimal("nan")])
def test_nothing_is_left_out_where_text_is_needed(format: Any, row: Any, spare: set[str], nothing: Any) -> None:
    for name in row:
        if name in spare:  # no input is what an empty one is, and so on
            assert documents(format, row | {name: nothing}) == documents(format, row | {name: ""})
            continue
        with pytest.raises(Unusable):
            documents(format, row | {name: nothing})


@pytest.mark.parametrize(("format", "row", "spare"), FORMATS)
def test_a_row_without_a_field_is_left_out_and_a_source_without_it_is_an_error(
    format: Any, row: Any, spare: set[str], tmp_path: Path
) -> None:
    first = next(iter(row))
    other = write_lines(tmp_path / "other.jsonl", [row | {first: f"{row[first]} indeed"}])
    for name in row.keys() - spare:
        without = {key: value for key, value in row.items() if key != name} | {f"{name}s": "x"}
        found = [
            write_lines(tmp_path / f"{name}{number}.jsonl", rows)
            for number, rows in enumerate(([without, row], [without] * 3))
        ]
        for some, path in zip((True, False), found, strict=True):
            config = data_config(
                source=files(path), format=format, validation={"source": files(other), "fraction": None},
                packing=PAIRS if format["kind"] == "preference" else {"mode": "stream"},
            )  # fmt: skip
            if some:
                assert sum(prepare(config, byte_tokenizer(), tmp_path).train.skipped.values()) == 1
                continue
            with pytest.raises(InputError, match=rf"{path.name}, row 1 has no field '(messages|{name})'"):
                prepare(config, byte_tokenizer(), tmp_path)


def test_a_column_that_no_row_has_is_an_error_wherever_rows_are_read(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"texts": "a"}, {"texts": "b"}])
    config = data_config(source=files(path), validation={"source": files(path), "fraction": None})
    with pytest.raises(
        InputError, match=r"a\.jsonl, row 1 has no field 'text'; did you mean 'texts'\? \(it has: texts"
    ):
        list(training_texts(config.model_copy(update={"validation": data_config().validation}),
                            build_formatter(config.format, TOKENS)))  # fmt: skip
    other = write_lines(tmp_path / "b.jsonl", [{"questions": "a"}])
    config = data_config(format={"kind": "gsm8k"}, validation={"source": files(other), "fraction": None})
    with pytest.raises(InputError, match="row 1 has no field 'answer'"):
        list(questions(config, build_formatter(config.format, TOKENS)))


def test_a_column_that_no_row_has_is_an_error_before_a_long_source_is_read() -> None:
    formatter = build_formatter(data_config(format={"kind": "text"}).format, TOKENS)

    def read(rows: list[dict[str, Any]]) -> int:
        """The number of rows read before the error."""
        columns = ColumnCheck()
        for number, row in enumerate(rows):
            try:
                formatter.documents(row, PLACE)
            except Unusable as reason:
                try:
                    columns.add(reason)
                except InputError:
                    return number + 1
            else:
                columns.add(None)
        return 0

    assert read([{"other": "a"}] * 2_000 + [{"text": "b"}]) == 2_000
    for has_it in ({"text": "b"}, {"text": None}, {"text": ""}):
        assert not read([{"other": "a"}] * 1_999 + [has_it] + [{"other": "a"}] * 3_000)


@given(st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans()))
def test_numbers_are_texts_as_json_writes_them(value: Any) -> None:
    assert documents({"kind": "text"}, {"text": value}) == [json.dumps(value)]
    row = {"prompt": "a", "completion": value}
    assert documents(CHAT, row)[0] == f"<user>a<assistant>{json.dumps(value)}"
    turns = [{"role": "user", "content": value}, {"role": "assistant", "content": value}]
    assert documents(CHAT, {"messages": turns})[0] == f"<user>{json.dumps(value)}<assistant>{json.dumps(value)}"


def test_other_values_that_have_one_spelling_are_texts() -> None:
    values = {Decimal("1.10"): "1.10", datetime.date(2026, 1, 2): "2026-01-02", datetime.time(3, 4): "03:04:00",
              datetime.datetime(2026, 1, 2, 3, 4): "2026-01-02T03:04:00"}  # fmt: skip
    for value, text in values.items():
        assert documents({"kind": "text"}, {"text": value}) == [text]
    for value in (math.inf, -math.inf, Decimal("inf")):
        with pytest.raises(Unusable, match="infinite"):
            documents({"kind": "text"}, {"text": value})
    for value in (["a"], {"a": 1}, b"a"):
        with pytest.raises(InputError, match="row 7: field 'text' is not text but"):
            documents({"kind": "text"}, {"text": value})
    with pytest.raises(InputError, match="not text but list; data/format=chat reads lists of messages"):
        documents({"kind": "prompt_completion"}, {"prompt": [{"role": "user", "content": "a"}], "completion": "b"})
