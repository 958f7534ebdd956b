"""The same rows give the same documents in every file format, however they are spread over files."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import TOKENS, files

from pretune.core.config import validate
from pretune.data.formats.build import build_formatter
from pretune.data.formats.config import InstructionFormat, PromptCompletionFormat, TextFormat
from pretune.data.formats.formatter import Formatter
from pretune.data.formats.segments import Place, Segment, Unusable
from pretune.data.sources.config import FilesSource
from pretune.data.sources.rows import Row, rows

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
LOOKS_LIKE = st.sampled_from(
    ["007", "7", "2024-01-01", "2024-01-01T00:00:00", "null", "NaN", "true", "1e5", '{"a": 1}', "[]"]
)
CELL = TEXT | LOOKS_LIKE | st.none()  # which is an empty cell in CSV
CASES: list[tuple[tuple[str, ...], Any, dict[str, Any]]] = [
    (("text", "url"), TextFormat, {"kind": "text", "column": "text", "parse_special": False}),
    (("prompt", "completion", "day"), PromptCompletionFormat,
     {"kind": "prompt_completion", "prompt": "prompt", "completion": "completion", "score_prompt": False,
      "parse_special": False}),
    (("instruction", "input", "output"), InstructionFormat,
     {"kind": "instruction", "preamble": True, "score_prompt": True, "refuse_columns": ["system", "history"]}),
]  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> tuple[Formatter, list[list[Row]]]:
    """A format, and rows for it in one to three files, some of which may be without the last column or empty."""
    columns, section, values = draw(st.sampled_from(CASES))
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        has = columns if draw(st.booleans()) or columns[-1] in ("completion", "output") else columns[:-1]
        parts.append(draw(st.lists(st.fixed_dictionaries(dict.fromkeys(has, CELL)), max_size=4)))
    return build_formatter(validate(section, values), TOKENS), parts


def write(path: Path, part: list[Row]) -> Path:
    match path.suffixes[0]:
        case ".jsonl":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part), encoding="utf-8")
        case ".json":
            path.write_bytes(gzip.compress(json.dumps(part).encode("utf-16")))
        case ".csv":
            with path.open("w", encoding="utf-8-sig", newline="") as file:
                writer = csv.DictWriter(file, list(part[0]) if part else [], quoting=csv.QUOTE_ALL)
                writer.writeheader()
                writer.writerows(part)
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), path, row_group_size=2)
    return path


def documents(formatter: Formatter, found: Iterator[Row], source: FilesSource) -> list[list[Segment]]:
    kept: list[list[Segment]] = []
    for number, row in enumerate(found):
        try:
            kept += formatter.documents(row, Place(source, number))
        except Unusable:
            continue
    return kept


def check(formatter: Formatter, parts: list[list[Row]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".jsonl", ".json", ".parquet", ".csv"):
            paths = [write(Path(folder) / f"{number}{suffix}", part) for number, part in enumerate(parts)]
            for order in itertools.permutations(range(len(parts))):
                source = validate(FilesSource, files(*(paths[number] for number in order)))
                wanted = documents(formatter, itertools.chain.from_iterable(parts[number] for number in order), source)
                assert documents(formatter, rows(source), source) == wanted


@given(cases())
@settings(max_examples=25)
def test_every_form_gives_the_same_documents(case: tuple[Formatter, list[list[Row]]]) -> None:
    check(*case)


@pytest.mark.slow
@given(cases())
@settings(max_examples=2000)
def test_every_form_gives_the_same_documents_2000_times(case: tuple[Formatter, list[list[Row]]]) -> None:
    check(*case)
