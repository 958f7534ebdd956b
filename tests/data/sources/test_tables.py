"""Parquet and CSV: the rows that JSON would have."""

from __future__ import annotations

import csv
import datetime
import decimal
import io
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretune.core.config import InputError
from pretune.data.sources.data_file import DataFile
from pretune.data.sources.tables import BATCH_ROWS, csv_rows, parquet_rows

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def file(content: bytes | str, name: str = "it.csv") -> DataFile:
    encoded = content if isinstance(content, bytes) else content.encode()
    return DataFile(name, lambda: io.BytesIO(encoded))


def rows_of(content: bytes | str, name: str = "it.csv") -> list[dict[str, Any]]:
    return list(csv_rows(file(content, name)))


@given(st.lists(TEXT, min_size=1, max_size=4, unique=True), st.data())
def test_csv_as_python_writes_it(columns: list[str], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.tuples(*[TEXT] * len(columns)), max_size=5))
    for name, delimiter in (("it.csv", ","), ("it.TSV.gz", "\t")):
        written = io.StringIO(newline="")
        csv.writer(written, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([columns, *rows])
        wanted = [dict(zip(columns, row, strict=True)) for row in rows]
        assert rows_of(written.getvalue().encode("utf-8-sig"), name) == wanted


@pytest.mark.parametrize(("content", "message"), [
    ("a,b\n1,2\n3\n", "line 3 has 1 values for 2 columns"),
    ("a,b\n1,2,3\n", "line 2 has 3 values for 2 columns"),
    ("a,a\n1,2\n", "names column 'a' twice"),
    ('a,b\n1,"2\n', "is not CSV"),
    (b"a,b\n1,caf\xe9\n", "line 2 is not UTF-8"),
])  # fmt: skip
def test_a_csv_file_with_a_mistake(content: bytes | str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rows_of(content)


def test_csv_guesses_nothing_and_takes_long_cells() -> None:
    long = "x" * 300_000
    found = rows_of(f"id,text\n007,{long}\n\n1.50,\n")
    assert found == [{"id": "007", "text": long}, {"id": "1.50", "text": ""}]
    assert rows_of("") == rows_of("a,b\n") == []


def test_parquet_values_are_those_of_json() -> None:
    moment = datetime.datetime(2024, 1, 2, 3, 4, 5)
    table = pyarrow.table({
        "text": ["a", None],
        "day": [moment.date(), None],
        "at": [moment, None],
        "price": pyarrow.array([decimal.Decimal("1.50"), None]),
        "raw": [b"bytes", b"\xff"],
        "score": [float("inf"), 0.1],
        "calls": [[{"name": "f", "arguments": {"city": "Paris", "unit": None}}], [{"name": "g", "arguments": None}]],
        "map": pyarrow.array([[("k", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "kind": pyarrow.array(["x", "x"]).dictionary_encode(),
    })  # fmt: skip
    written = io.BytesIO()
    pyarrow.parquet.write_table(table, written)
    first, second = parquet_rows(file(written.getvalue(), "it.parquet"))
    assert first == {
        "text": "a", "day": "2024-01-02", "at": "2024-01-02T03:04:05", "price": "1.50", "raw": "bytes",
        "score": float("inf"), "calls": [{"name": "f", "arguments": {"city": "Paris"}}], "map": {"k": 1}, "kind": "x",
    }  # fmt: skip
    assert second == {
        "text": None, "day": None, "at": None, "price": None, "raw": b"\xff", "score": 0.1, "calls": [{"name": "g"}],
        "map": {}, "kind": "x",
    }  # fmt: skip


def test_parquet_rows_after_the_first_have_the_columns_that_are_needed() -> None:
    rows = [{"text": f"text {number}", "url": "u", "id": number} for number in range(BATCH_ROWS + 2)]
    written = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), written, row_group_size=700)
    found = list(parquet_rows(file(written.getvalue()), {"text", "id", "other"}))
    assert found[:BATCH_ROWS] == rows[:BATCH_ROWS]
    assert found[BATCH_ROWS:] == [{"text": row["text"], "id": row["id"]} for row in rows[BATCH_ROWS:]]
    assert list(parquet_rows(file(written.getvalue()), {"other"})) == rows


def test_a_column_name_twice() -> None:
    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    written = io.BytesIO()
    pyarrow.parquet.write_table(table, written)
    with pytest.raises(InputError, match="two columns named 'text'"):
        list(parquet_rows(file(written.getvalue())))


def test_a_damaged_parquet_file() -> None:
    written = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["abc" * 1000] * 100}), written)
    content = written.getvalue()
    for bad in (content[:-20], content[: len(content) // 2], b"", b"PAR1"):
        with pytest.raises(InputError, match=r"it\.parquet is not a parquet file, or is damaged"):
            list(parquet_rows(file(bad, "it.parquet")))
