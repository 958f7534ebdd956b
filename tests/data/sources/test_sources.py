from __future__ import annotations

import os
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import data_config, files, write_lines

from pretune.core.config import ConfigError, InputError, validate
from pretune.data.sources.config import PythonDocsSource
from pretune.data.sources.rows import Split, held_out, identity, rows, train_rows, validation_rows


def numbered(path: Path, count: int) -> Path:
    return write_lines(path, ({"text": str(number)} for number in range(count)))


def test_a_fraction_splits_rows_once_and_for_all(tmp_path: Path) -> None:
    source = files(numbered(tmp_path / "a.jsonl", 2000))
    config = data_config(source=source, validation={"fraction": 0.1, "seed": 5})
    train, validation = ([row["text"] for row in side(config)] for side in (train_rows, validation_rows))
    assert sorted(train + validation, key=int) == [str(number) for number in range(2000)]
    assert 150 < len(validation) < 250
    other = data_config(source=source, validation={"fraction": 0.1, "seed": 6})
    assert [row["text"] for row in validation_rows(other)] != validation


ROWS = st.lists(st.fixed_dictionaries({"text": st.text(max_size=3), "id": st.integers(0, 9)}), max_size=30)


@given(ROWS, ROWS, ROWS)
def test_other_rows_do_not_change_the_side_of_a_row(
    before: list[dict[str, Any]], some: list[dict[str, Any]], after: list[dict[str, Any]]
) -> None:
    """Nor do columns that the format does not read: rows of the same text are on one side."""
    split = Split.of(data_config(validation={"fraction": 0.5}))

    def sides(content: list[dict[str, Any]]) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {"train": set(), "validation": set()}
        for number, row in enumerate(content):
            found[split.side(number, row)].add(row["text"])
        return found

    alone, among = sides(some), sides([*before, *some, *after])
    assert all(alone[side] <= among[side] for side in alone)
    assert not among["train"] & among["validation"]


def test_a_column_of_dates_keeps_its_groups_together(tmp_path: Path) -> None:
    days = [datetime(2024, 1, 1 + number % 20, tzinfo=UTC) for number in range(200)]
    table = pyarrow.table({"text": [str(number) for number in range(200)], "day": days})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    config = data_config(source=files(tmp_path / "a.parquet"), validation={"fraction": 0.3, "group_by": "day"})
    train, validation = ({row["day"] for row in side(config)} for side in (train_rows, validation_rows))
    assert not train & validation
    assert len(train | validation) == 20


def test_few_different_rows_leave_some_on_both_sides(tmp_path: Path) -> None:
    for number in range(20):
        two = [f"a{number}", f"b{number}"] * 10
        source = files(write_lines(tmp_path / f"{number}.jsonl", ({"text": text} for text in two)))
        config = data_config(source=source, validation={"fraction": 0.1, "seed": 5})
        train, validation = ([row["text"] for row in side(config)] for side in (train_rows, validation_rows))
        assert len(train) == len(validation) == 10
        assert len({*train}) == len({*validation}) == 1
    one = data_config(
        source=files(write_lines(tmp_path / "one.jsonl", [{"text": "a"}] * 9)), validation={"fraction": 0.1}
    )
    with pytest.raises(InputError, match="too small"):
        list(validation_rows(one))


def test_rows_that_share_a_value_stay_on_one_side(tmp_path: Path) -> None:
    pairs = ({"prompt": f"question {number % 300}", "text": str(number)} for number in range(3000))
    source = files(write_lines(tmp_path / "a.jsonl", pairs))
    config = data_config(source=source, validation={"fraction": 0.2, "group_by": "prompt"})
    train, validation = ({row["prompt"] for row in side(config)} for side in (train_rows, validation_rows))
    assert not train & validation
    assert len(train | validation) == 300
    assert 35 < len(validation) < 90
    misnamed = data_config(source=source, validation={"fraction": 0.2, "group_by": "promt"})
    with pytest.raises(ConfigError, match=r"group_by=promt: row 0 has no such field, it has prompt, text"):
        list(validation_rows(misnamed))


@given(st.integers(), st.floats(0.01, 0.5), st.integers(0, 10**12))
def test_a_larger_fraction_holds_out_what_a_smaller_one_does(seed: int, fraction: float, row: int) -> None:
    assert held_out(seed, fraction, row) <= held_out(seed, fraction * 1.5, row)


def test_a_validation_source_of_its_own(tmp_path: Path) -> None:
    train, validation = numbered(tmp_path / "t.jsonl", 3), numbered(tmp_path / "v.jsonl", 2)
    config = data_config(source=files(train), validation={"source": files(validation), "fraction": None})
    assert len(list(train_rows(config))) == 3
    assert len(list(validation_rows(config))) == 2
    same = data_config(source=files(train), validation={"source": files(train), "fraction": None})
    with pytest.raises(ConfigError, match=r"validation\.source has .*t\.jsonl, and so has data\.source"):
        next(validation_rows(same))
    (tmp_path / "link.jsonl").symlink_to(validation)
    within = data_config(source=files(tmp_path / "*.jsonl"), validation={"source": files(validation), "fraction": None})
    with pytest.raises(ConfigError, match=r"validation\.source has .*v\.jsonl, and so has data\.source"):
        next(validation_rows(within))
    # Training may end within the first of its files: what is in the others is compared when it is prepared.
    begins = files(train, validation, max_rows=3)
    apart = data_config(source=begins, validation={"source": files(validation), "fraction": None})
    assert len(list(train_rows(apart))) == 3


def test_an_empty_side_is_an_error(tmp_path: Path) -> None:
    empty, full = numbered(tmp_path / "e.jsonl", 0), numbered(tmp_path / "f.jsonl", 3)
    with pytest.raises(InputError, match=r"e\.jsonl has no rows"):
        list(train_rows(data_config(source=files(empty))))
    with pytest.raises(InputError, match=r"validation\.fraction = 1e-09"):
        list(validation_rows(data_config(source=files(full), validation={"fraction": 1e-9})))
    with pytest.raises(InputError, match=r"validation source has no rows: files .*e\.jsonl"):
        list(validation_rows(data_config(source=files(full), validation={"source": files(empty), "fraction": None})))


def test_a_file_that_changed_is_another_source(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.jsonl", 3)
    source = data_config(source=files(path)).source
    before = identity(source, tmp_path / "cache")
    os.utime(path, (1, 1))
    assert identity(source, tmp_path / "cache") == before
    path.write_text(path.read_text().replace("1", "5"))
    os.utime(path, (1, 1))
    assert identity(source, tmp_path / "cache") != before


def test_sources_stream() -> None:
    """Taking the first rows must not read the rest, because all of this Python's documentation takes half a minute."""
    section = validate(PythonDocsSource, {"kind": "python_docs", "packages": None, "max_bytes": None})
    assert len(list(islice(rows(section), 5))) == 5
