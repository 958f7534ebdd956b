"""Held-out documents that are in the training data too are found by what is in them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import MATHQA, byte_tokenizer, data_config, files, write_lines, write_texts

from pretune.core.config import ConfigError
from pretune.data.contamination import num_contained
from pretune.data.encoding import Sizes
from pretune.data.shards import Prepared, prepare

PREFERENCE = {"kind": "preference", "template": {"kind": "instruction", "preamble": False, "score_prompt": False}}
PAIRS = {"mode": "pairs", "isolate": True, "too_long": "drop"}
SMALL = Sizes(shard_tokens=300, chunk_characters=100)


def held_out_of(source: dict[str, Any]) -> dict[str, Any]:
    return {"source": source, "fraction": None}


def prepared(folder: Path, **changes: Any) -> Prepared:
    return prepare(data_config(**changes), byte_tokenizer(), folder / "cache", SMALL)


def songs(first: int, last: int) -> list[str]:
    return [f"song number {number}" for number in range(first, last)]


def test_a_copy_of_the_validation_set_in_the_training_data_is_refused(tmp_path: Path) -> None:
    train = write_texts(tmp_path, songs(0, 50), "train.jsonl")
    copy = write_texts(tmp_path, songs(40, 50), "copy.jsonl")
    message = r"10 of the 10 held-out documents of data are in the training data of data too: .*take them out of one"
    with pytest.raises(ConfigError, match=message):
        prepared(tmp_path, source=files(train), validation=held_out_of(files(copy)))
    # Of a training set that ends before them, they are no part.
    data = prepared(tmp_path, source=files(train, max_rows=40), validation=held_out_of(files(copy)))
    assert data.notes == ()


def test_a_few_equal_documents_are_counted_and_kept(tmp_path: Path) -> None:
    train = write_texts(tmp_path, songs(0, 50), "train.jsonl")
    other = write_texts(tmp_path, [*songs(100, 108), *songs(3, 4), *songs(3, 4)], "other.jsonl")
    data = prepared(tmp_path, source=files(train), validation=held_out_of(files(other)))
    assert data.notes == ("2 of 10 held-out documents are in the training data too",)
    assert (data.train.num_documents, data.validation.num_documents) == (50, 10)


def test_a_file_that_two_globs_match_is_noticed(tmp_path: Path) -> None:
    write_texts(tmp_path, songs(0, 50), "train.jsonl")
    source = files(tmp_path / "t*.jsonl", tmp_path / "*n.jsonl")
    other = files(write_texts(tmp_path, songs(60, 70), "other.jsonl"))
    data = prepared(tmp_path, source=source, validation=held_out_of(other))
    assert data.notes == ("50 of 100 training documents repeat another",)


def test_repeated_rows_of_a_split_source_are_on_one_side(tmp_path: Path) -> None:
    repeated = [{"text": text, "id": number} for number, text in enumerate(songs(0, 60) * 3)]
    data = prepared(tmp_path, source=files(write_lines(tmp_path / "a.jsonl", repeated)))
    assert data.train.num_documents + data.validation.num_documents == 180
    assert data.validation.num_documents % 3 == 0
    kept = data.train.num_documents
    assert data.notes == (f"{kept * 2 // 3} of {kept} training documents repeat another",)


def test_what_one_set_holds_out_no_other_set_trains_on(tmp_path: Path) -> None:
    own = write_texts(tmp_path, songs(0, 50), "own.jsonl")
    mixed = write_texts(tmp_path, songs(200, 250), "mixed.jsonl")
    held_out = write_texts(tmp_path, songs(240, 300), "held_out.jsonl")
    part = {"share": 0.2, "source": files(mixed), "validation": {"source": None, "fraction": 0.2, "seed": 3,
            "group_by": None}, "format": {"kind": "text", "column": "text"},
            "packing": {"mode": "stream", "too_long": "split", "isolate": False}}  # fmt: skip
    with pytest.raises(ConfigError, match=r"held-out documents of data are in the training data of data\.mix\.x too"):
        prepared(tmp_path, source=files(own), validation=held_out_of(files(held_out, max_rows=10)), mix={"x": part})
    data = prepared(tmp_path, source=files(own), validation=held_out_of(files(held_out)), mix={"x": part})
    (note,) = data.notes
    assert note.endswith("of 60 held-out documents are in the training data too (data in data.mix.x)")
    assert set(data.fingerprints()) == {"train", "validation", "x train", "x validation"}


def test_a_pair_is_known_by_both_its_sides(tmp_path: Path) -> None:
    pairs = [{"prompt": f"p{n}", "chosen": "yes", "rejected": f"no {n}"} for n in range(20)]
    train = files(write_lines(tmp_path / "train.jsonl", pairs))
    settings: dict[str, Any] = {"source": train, "format": PREFERENCE, "packing": PAIRS, "sequence_length": 200}
    other = [row | {"rejected": "other"} for row in pairs[:10]]  # the chosen sides are the same
    data = prepared(tmp_path, validation=held_out_of(files(write_lines(tmp_path / "o.jsonl", other))), **settings)
    assert data.notes == ()
    with pytest.raises(ConfigError, match=r"10 of the 10 held-out pairs of data"):
        prepared(tmp_path, validation=held_out_of(files(write_lines(tmp_path / "s.jsonl", pairs[5:15]))), **settings)


def test_a_problem_with_another_rationale_is_the_same_problem(tmp_path: Path) -> None:
    options = "a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) 5"
    rows = [
        {"Problem": f"p{number % 40}", "Rationale": f"because {number}", "options": options, "correct": "a"}
        for number in range(200)
    ]
    data = prepared(tmp_path, source=files(write_lines(tmp_path / "a.jsonl", rows)), format=MATHQA)
    assert data.validation.num_documents % 5 == 0
    assert not any("held-out" in note for note in data.notes)


def test_documents_that_only_their_format_makes_equal_are_found(tmp_path: Path) -> None:
    """A format may render different rows the same: here it strips spaces from a question."""
    format = {"kind": "gsm8k", "calculations": False, "score_prompt": False}
    rows = [{"question": "How many?" + " " * n, "answer": "#### 4"} for n in range(40)]
    source = files(write_lines(tmp_path / "a.jsonl", rows))
    with pytest.raises(ConfigError, match=r"set data\.validation\.group_by to a column that is equal"):
        prepared(tmp_path, source=source, format=format)


@given(st.lists(st.integers(0, 40), min_size=1), st.lists(st.integers(0, 40)))
def test_contained_hashes_are_counted_as_a_set_does(wanted: list[int], present: list[int]) -> None:
    found = num_contained(np.array(wanted, dtype=np.uint64), np.array(present, dtype=np.uint64))
    assert found == sum(count for value, count in Counter(wanted).items() if value in set(present))
