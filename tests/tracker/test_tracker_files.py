from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretune.core.config import InputError
from pretune.tracker.files import JsonLines, json_ready, read_rows


def test_a_row_is_on_disk_at_once_and_is_strict_json(tmp_path: Path) -> None:
    rows = JsonLines(tmp_path / "deep" / "metrics.jsonl")
    rows.append({"step": 1, "a": math.nan, "b": math.inf, "c": torch.tensor(2.5), "d": "é\n\u2028", "e": True})
    text = rows.path.read_text()
    assert text.endswith("\n")
    assert text.count("\n") == 1

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(text, parse_constant=refuse) == {
        "step": 1, "a": None, "b": None, "c": 2.5, "d": "é\n\u2028", "e": True
    }  # fmt: skip


def test_rewind_drops_what_came_after_the_step(tmp_path: Path) -> None:
    rows = JsonLines(tmp_path / "metrics.jsonl")
    for step in (0, 10, 10, 20, 30):
        rows.append({"step": step})
    rows.rewind(10)
    assert read_rows(rows.path) == [{"step": 0}, {"step": 10}, {"step": 10}]
    rows.append({"step": 11})
    assert read_rows(rows.path)[-1] == {"step": 11}
    rows.rewind(-1)
    assert read_rows(rows.path) == []


def test_rewind_without_a_file_makes_none(tmp_path: Path) -> None:
    JsonLines(tmp_path / "metrics.jsonl").rewind(5)
    assert list(tmp_path.iterdir()) == []


@given(cut=st.integers(min_value=0, max_value=200), step=st.integers(min_value=-1, max_value=12))
def test_a_file_torn_anywhere_goes_on_after_rewind(
    tmp_path_factory: pytest.TempPathFactory, cut: int, step: int
) -> None:
    path = tmp_path_factory.mktemp("torn") / "metrics.jsonl"
    whole = "".join(json.dumps({"step": i, "x": "a}\u00e9{"}, ensure_ascii=False) + "\n" for i in range(10)).encode()
    path.write_bytes(whole[: min(cut, len(whole))])
    survived = path.read_bytes().count(b"\n")
    rows = JsonLines(path)
    rows.rewind(step)
    rows.append({"step": step + 1})
    assert [row["step"] for row in read_rows(path)] == [*(i for i in range(survived) if i <= step), step + 1]


@pytest.mark.parametrize("bad", ["{", "[1]", "nonsense", "12"])
def test_a_bad_line_is_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 2}}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2"):
        read_rows(path)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_anything_becomes_json(value: object) -> None:
    json.loads(json.dumps(json_ready(value), allow_nan=False))
