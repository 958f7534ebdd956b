"""Tasks in long texts: lengths in the run's own tokens, places, answers, and that they are the same each time."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from pretune.core.config import ConfigError, InputError, validate
from pretune.data.formats.long_task import LongTask
from pretune.data.formats.segments import Filler, Place
from pretune.data.sources.config import LongTaskSource
from pretune.data.sources.rows import rows
from pretune.data.tokenizer import Tokenizer

WORDS = "the cat sees a red house under two blue trees and runs quickly over there "
TASKS = ("passkey", "many_keys", "instruction_then_distraction")


def section(folder: Path, **changes: Any) -> LongTaskSource:
    file = folder / "texts.jsonl"
    if not file.exists():
        file.write_text("".join(json.dumps({"text": WORDS * repeat}) + "\n" for repeat in (1, 7, 3)))
    text = {"kind": "files", "files": [str(file)], "format": "auto", "max_rows": None}
    values = {
        "kind": "long_task", "task": "passkey", "text": text, "column": "text", "num_examples": 4, "min_length": 64,
        "max_length": 300, "min_depth": 0.0, "max_depth": 1.0, "digits": 5, "num_keys": 4, "seed": 1,
    }  # fmt: skip
    return validate(LongTaskSource, values | changes)


def tokenizer(bos: bool) -> Tokenizer:
    """A token for each byte; with `bos`, one before each text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return Tokenizer(backend, "</s>", "<s>" if bos else "")


def encoded(row: dict[str, Any], source: LongTaskSource, bos: bool) -> tuple[list[int], list[list[int]]]:
    """What begins the prompt of a row, and the ids of its segments."""
    one, segments = tokenizer(bos), LongTask().prompt(row, Place(source, 0))
    ids = one.encode_segments(segments)
    return [*one.document_start(ids)], ids


@given(
    task=st.sampled_from(TASKS), bos=st.booleans(), length=st.integers(600, 4000), depth=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_a_prompt_has_the_length_that_was_asked_for(
    tmp_path_factory: pytest.TempPathFactory, task: str, bos: bool, length: int, depth: float, seed: int
) -> None:
    cell = {"min_length": length, "max_length": length, "min_depth": depth, "max_depth": depth}
    source = section(tmp_path_factory.getbasetemp(), task=task, num_examples=1, seed=seed, **cell)
    (row,) = rows(source)
    start, ids = encoded(row, source, bos)
    assert len(start) == bos
    assert len(start) + sum(map(len, ids)) == length
    assert (row["length"], row["depth"]) == (length, depth)
    if task == "passkey":
        needle = next(place for place, piece in enumerate(row["pieces"]) if piece["share"] is None)
        fillers = [len(one) for one, piece in zip(ids, row["pieces"], strict=False) if piece["share"] is not None]
        before = sum(len(one) for one in ids[:needle])
        assert before == pytest.approx(depth * sum(fillers), abs=1)


def test_a_document_is_its_prompt_and_the_answer(tmp_path: Path) -> None:
    source = section(tmp_path, min_length=250)
    for row in rows(source):
        (document,) = LongTask().documents(row, Place(source, 0))
        assert document[:-1] == LongTask().prompt(row, Place(source, 0))
        assert [segment.scored for segment in document] == [False] * (len(document) - 1) + [True]
        one = tokenizer(False)
        *prompt, _ = one.encode_segments(document)
        assert prompt == one.encode_segments(document[:-1]), "the answer takes nothing from the text"
        text = one.decode(list(chain.from_iterable(prompt)))
        assert text.endswith(row["question"])
        assert text.count(row["answer"].strip()) == 2


def test_each_task_says_what_it_asks_for(tmp_path: Path) -> None:
    for row in rows(section(tmp_path, task="many_keys", num_keys=6, num_examples=20)):
        said = dict(needle.strip().removeprefix("The key of ").rstrip(".").split(" is ") for needle in row["needles"])
        assert len(said) == 6
        name = row["question"].split("The key of ")[1].removesuffix(" is")
        assert said[name] == row["answer"].strip()
    done = {"in capitals": str.upper, "backwards": lambda word: word[::-1]}
    seen = 0
    for row in rows(section(tmp_path, task="instruction_then_distraction", num_examples=60)):
        first, *later = row["needles"]
        assert row["pieces"][0]["text"] == first
        assert len(later) == 3
        for doing, change in done.items():
            if doing in first:
                seen += 1
                assert row["answer"].strip() == change(first.split("the word ")[1].split()[0])
    assert seen > 5


def test_the_seed_decides(tmp_path: Path) -> None:
    first, again, other = (list(rows(section(tmp_path, seed=seed))) for seed in (1, 1, 2))
    assert first == again
    assert {row["answer"] for row in first}.isdisjoint(row["answer"] for row in other)


def test_lengths_and_depths_are_spread(tmp_path: Path) -> None:
    found = list(rows(section(tmp_path, num_examples=400, min_length=100, max_length=300)))
    lengths, depths = [row["length"] for row in found], [row["depth"] for row in found]
    assert (min(lengths), max(lengths)) == pytest.approx((100, 300), abs=5)
    assert sum(lengths) / 400 == pytest.approx(200, abs=12)
    assert sum(depths) / 400 == pytest.approx(0.5, abs=0.06)


def test_what_cannot_be_filled_or_is_upside_down(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no text in its column words to fill prompts with"):
        list(rows(section(tmp_path, column="words")))
    with pytest.raises(ConfigError, match=r"min_length \(200\) is larger than max_length \(100\)"):
        section(tmp_path, min_length=200, max_length=100)


def test_a_filler_that_has_too_little_text_is_all_there() -> None:
    one = tokenizer(False)
    ids = one.encode_segments([Filler("abc", False, length=10, share=1.0)])
    assert one.decode(ids[0]) == "abc"
