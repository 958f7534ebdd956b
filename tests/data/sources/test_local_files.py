from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from small_data import files, write_lines

from pretune.core.config import InputError, validate
from pretune.data.sources import local_files
from pretune.data.sources.config import FilesSource


def read(*names: Path | str, **other: object) -> list[dict]:
    return list(local_files.rows(validate(FilesSource, files(*names, **other))))


def texts(*names: Path | str, **other: object) -> list[str]:
    return [row["text"] for row in read(*names, **other)]


def fails(*names: Path | str, **other: object) -> str:
    with pytest.raises(InputError) as caught:
        read(*names, **other)
    return str(caught.value)


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress),
                                              (".bz2", bz2.compress)])  # fmt: skip
def test_lines_and_arrays_compressed_or_not(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    records = [{"text": "one\nline"}, {"text": "zwei \u2014 ü"}]
    lines, array = tmp_path / f"a.jsonl{suffix}", tmp_path / f"b.json{suffix}"
    lines.write_bytes(pack("\n".join(map(json.dumps, records)).encode()))
    array.write_bytes(pack(json.dumps(records, indent=2).encode()))
    assert read(lines) == read(array) == records
    assert read(lines, array) == records * 2


def test_zstandard(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "z"}\n'))
    assert texts(tmp_path / "a.jsonl.zst") == ["z"]


def test_parquet_and_mixed_kinds_keep_the_order_given(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["p"]}), tmp_path / "p.parquet")
    write_lines(tmp_path / "j.jsonl", [{"text": "j"}])
    (tmp_path / "t.txt").write_text("t\n")
    names = [tmp_path / name for name in ("t.txt", "p.parquet", "j.jsonl", "p.parquet")]
    assert texts(*names) == ["t\n", "p", "j", "p"]


def test_a_glob_reads_by_name_and_max_rows_stops(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write_lines(tmp_path / f"{name}.jsonl", [{"text": name}, {"text": name * 2}])
    assert texts(tmp_path / "*.jsonl") == ["a", "aa", "b", "bb", "c", "cc"]
    assert texts(tmp_path / "*.jsonl", max_rows=3) == ["a", "aa", "b"]


def test_names_with_the_characters_of_patterns(tmp_path: Path) -> None:
    write_lines(tmp_path / "a[1].jsonl", [{"text": "x"}])
    (tmp_path / "b*.txt").write_text("y")
    assert texts(tmp_path / "a[1].jsonl", tmp_path / "b*.txt") == ["x", "y"]


def test_a_long_text_file_becomes_rows_cut_at_line_ends(tmp_path: Path) -> None:
    content = "".join(f"line {number} of the book\n\n" for number in range(5000))
    (tmp_path / "book.txt").write_text(content)
    parts = texts(tmp_path / "book.txt")
    assert "".join(parts) == content
    assert len(parts) > 5
    assert all(part.endswith("\n") for part in parts)


def test_empty_files_have_no_rows(tmp_path: Path) -> None:
    for name in ("e.jsonl", "e.txt"):
        (tmp_path / name).write_text("")
    write_lines(tmp_path / "f.jsonl", [{"text": "x"}])
    assert read(tmp_path / "e.jsonl") == read(tmp_path / "e.txt") == []
    assert texts(tmp_path / "e.jsonl", tmp_path / "f.jsonl", tmp_path / "e.txt") == ["x"]


@pytest.mark.parametrize(("content", "place"), [
    (b'{"text": "a"}\n{"text": "b"}\nnot json\n{"text": "c"}\n', "line 3"),
    (b'{"text": "a"}\n\n{"text": \n', "line 3"),
    (b'not json\n', "line 1"),
    (b'[{"text": "x"},\n {"text":', "line 2"),
    (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2"),
    (b'{"text": "a"}\n[1]\n', "line 2"),
])  # fmt: skip
def test_what_is_not_json_names_file_and_line(tmp_path: Path, content: bytes, place: str) -> None:
    write_lines(tmp_path / "good.jsonl", [{"text": "x"}])
    (tmp_path / "bad.json").write_bytes(content)
    message = fails(tmp_path / "good.jsonl", tmp_path / "bad.json")
    assert str(tmp_path / "bad.json") in message
    assert place in message


def test_a_bad_line_far_into_a_compressed_file(tmp_path: Path) -> None:
    good = b'{"text": "' + b"x" * 2000 + b'"}\n'
    (tmp_path / "big.jsonl.gz").write_bytes(gzip.compress(good * 12_000 + b"{oops}\n" + good, 1))
    assert "big.jsonl.gz line 12001" in fails(tmp_path / "big.jsonl.gz")


@pytest.mark.parametrize(("name", "content", "word"), [
    ("cut.jsonl.gz", gzip.compress(b'{"text": "z"}\n' * 100, mtime=0)[:30], "decompressed"),
    ("cut.jsonl.xz", lzma.compress(b'{"text": "z"}\n' * 100)[:60], "decompressed"),
    ("cut.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:20], "cut.txt.gz"),
    ("no.parquet", b"no parquet here", "no.parquet is not a parquet file"),
    ("latin.txt", "é".encode("latin-1") * 10, "UTF-8"),
    ("what.bin", b"x", "data.source.format"),
])  # fmt: skip
def test_damaged_and_unknown_files(tmp_path: Path, name: str, content: bytes, word: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert word in fails(tmp_path / name)


def test_patterns_that_name_no_file(tmp_path: Path) -> None:
    assert "no file matches" in fails(tmp_path / "*.jsonl")
    assert "is a folder" in fails(tmp_path)


def test_the_format_can_be_said(tmp_path: Path) -> None:
    write_lines(tmp_path / "odd.name", [{"text": "x"}])
    assert texts(tmp_path / "odd.name", format="json") == ["x"]
