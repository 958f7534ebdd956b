"""Values come out of a file as Python's own parser reads them, in any layout and whatever the size of a block."""

from __future__ import annotations

import io
import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretune.core.config import InputError
from pretune.data.sources.data_file import DataFile
from pretune.data.sources.json_values import records, values

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
LAYOUTS = {
    "lines": lambda items: "\n".join(map(json.dumps, items)),
    "lines, ended": lambda items: "".join(json.dumps(item, ensure_ascii=False) + "\r\n" for item in items),
    "blank lines": lambda items: "\n\n".join(["", *map(json.dumps, items), " \n"]),
    "indented": lambda items: "\n".join(json.dumps(item, indent=2) for item in items),
    "array": json.dumps,
    "indented array": lambda items: f" \n{json.dumps(items, indent=1, ensure_ascii=False)}\n\n",
    "two arrays": lambda items: json.dumps(items[:1]) + json.dumps(items[1:]),
    "carriage returns": lambda items: "\r".join(map(json.dumps, items)),
}


def file(content: bytes | str) -> DataFile:
    encoded = content if isinstance(content, bytes) else content.encode()
    return DataFile("it.json", lambda: io.BytesIO(encoded))


def read(content: bytes | str, block: int = 1 << 20) -> list[Any]:
    return [value for _, value in values(file(content), block)]


@given(st.lists(st.dictionaries(st.text(max_size=5), JSON, max_size=3)), st.sampled_from(sorted(LAYOUTS)),
       st.integers(1, 50), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))  # fmt: skip
def test_what_was_written_is_read(items: list[dict[str, Any]], layout: str, block: int, encoding: str) -> None:
    content = LAYOUTS[layout](items).encode(encoding, "surrogatepass" if encoding == "utf-32" else "strict")
    assert read(content, block) == items


@given(st.lists(JSON, max_size=4), st.integers(1, 9))
def test_any_value_on_lines_of_its_own(items: list[Any], block: int) -> None:
    flat = [item for item in items if not isinstance(item, list)]
    assert read("\n".join(map(json.dumps, flat)), block) == flat


@given(st.text(alphabet='{}[]",:\\ \n\r1.-eEtrufalsn\ud800'), st.integers(1, 5))
def test_any_text_is_read_as_python_reads_it_or_is_one_error(text: str, block: int) -> None:
    content = text.encode("utf-8", "replace")
    try:
        whole = json.loads(content) if content.strip() else []
        one = True
    except ValueError:
        whole, one = None, False
    try:
        found, message = read(content, block), ""
    except InputError as error:
        found, message = None, str(error)
    if one:
        assert found == (whole if isinstance(whole, list) else [whole])
    elif found is None:
        assert message.startswith("it.json line ")
        assert "\n" not in message
    else:
        # Several values, one after the other.
        assert len(found) != 1 or content.strip().startswith(b"[")


def test_nothing_is_inferred() -> None:
    """Neither from other rows nor from what a text looks like."""
    rows = [
        {"a": "007", "day": "2024-01-01", "n": 10**25, "f": 3.141592653589793, "args": {"x": 1}},
        {"a": 7, "n": 0, "args": {}, "b": None},
        {"a": ["x", {"y": None}], "n": True, "day": 1e21},
    ]
    assert read("\n".join(map(json.dumps, rows)) + "\n\n") == read(json.dumps(rows)) == rows
    assert [type(row["n"]) for row in read(json.dumps(rows))] == [int, int, bool]
    assert math.isnan(read('{"x": NaN}')[0]["x"])
    assert read('{"a": 1, "a": 2}') == [{"a": 2}]


def test_only_line_feeds_end_a_line() -> None:
    text = "a\u2028b\u0085c\x0bd\x0ce"
    assert read(json.dumps({"t": text}, ensure_ascii=False) + "\n") == [{"t": text}]


def test_half_a_character_becomes_the_replacement_character() -> None:
    assert read(r'{"t": "a\ud83d b\uDE00", "pair": "\ud83d\ude00", "\udc00": ["\ud800"]}') == [
        {"t": "a\ufffd b\ufffd", "pair": "\U0001f600", "\ufffd": ["\ufffd"]}
    ]


@pytest.mark.parametrize("block", [3, 1 << 20])
@pytest.mark.parametrize(("content", "message"), [
    ('{"a": 1}\n{"a": 2}\noops\n', "line 3, column 1 is not JSON: Expecting value"),
    ('{"a": 1}\n{"a": "cut\n{"a": 3}\n', "line 2, column 11 is not JSON: Invalid control character"),
    ('{"a": 1}\n\n{"a": 2\n{"a": 3}\n', r"line 4, column 1 .*begins in line 3"),
    ('[{"a": 1},\n {"a": 2},\n]', "line 3, column 1 is not JSON"),
    ('[{"a": 1}\n {"a": 2}]', "line 2, column 2 .*a comma or ] is missing"),
    ('[{"a": 1},\n', "line 2, column 1 is not JSON"),
    ('{"a": 1}\n{"a": "\\x"}', r"line 2, column 8 is not JSON: Invalid \\"),
    ('{"a": 1}\n\0\0\0\0', "line 2, column 1 is not JSON"),
    ('\n"text"\n', "line 2 is a text, not a record"),
    ('[["a"], ["b"]]', "line 1 is a list, not a record"),
    ('{"a": 1}\n2\n', "line 2 is a number, not a record"),
    ("[" * 100_000, "line 1 .*is a list|nested too deeply"),
    ('{"a":' * 100_000, "line 1, column 1 is not JSON: values are nested too deeply"),
    ('{"a": ' + "9" * 5000 + "}", "line 1, column 1 is not JSON: Exceeds the limit"),
    (b'{"a": "\xff"}', "line 1 is not UTF-8 text"),
    (b'{"a": 1}\n{"a": "caf\xe9"}', "line 2 is not UTF-8 text"),
    ('{"a": 1}'.encode("utf-16") + b"\x00", "UTF-16"),
])  # fmt: skip
def test_what_is_wrong_is_told_with_its_place(content: bytes | str, message: str, block: int) -> None:
    with pytest.raises(InputError, match=message):
        list(records(file(content), block))


@pytest.mark.parametrize("array", [False, True])
def test_memory_does_not_depend_on_the_size_of_the_file(tmp_path: Path, array: bool) -> None:
    path = tmp_path / "a.json"
    with path.open("w") as opened:
        opened.write("[" * array)
        for number in range(30_000):
            opened.write(
                ("," if array and number else "") + json.dumps({"text": f"{number} " * 100}) + "\n" * (not array)
            )
        opened.write("]" * array)
    assert path.stat().st_size > 15_000_000
    tracemalloc.start()
    try:
        assert sum(1 for _ in records(DataFile.local(path))) == 30_000
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


def test_a_long_value_is_read_in_linear_time() -> None:
    """Each time a value turns out to be longer, twice as much is read; the parser sees it some ten times."""
    long = {"text": "word " * 200_000, "list": list(range(50_000))}
    assert read(json.dumps([long, {"a": 1}]), block=1000) == [long, {"a": 1}]
