"""Preparing partly unusable data, and what a preparation leaves behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from small_data import MATHQA, byte_tokenizer, data_config, files, write_lines, write_texts

from pretune.core.config import InputError
from pretune.data.config import FileTokenizer
from pretune.data.shards import prepare
from pretune.data.tokenizer import load_tokenizer

GOOD = {"Problem": "p", "Rationale": "r", "options": "a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) 5", "correct": "a"}
BAD = GOOD | {"options": "a ) 1 , b ) 2"}


def test_rows_left_out_are_counted_with_the_reason(tmp_path: Path) -> None:
    mixed, bad = write_lines(tmp_path / "m.jsonl", [GOOD, BAD, BAD]), write_lines(tmp_path / "b.jsonl", [BAD])
    good = write_lines(tmp_path / "g.jsonl", [GOOD | {"Problem": "another"}])
    config = data_config(source=files(mixed), format=MATHQA, validation={"source": files(good), "fraction": None})
    data = prepare(config, byte_tokenizer(), tmp_path / "cache").train
    assert (data.num_documents, dict(data.skipped)) == (1, {"it does not have five options": 2})
    config = data_config(source=files(good), format=MATHQA, validation={"source": files(bad), "fraction": None})
    with pytest.raises(InputError, match=r"no row of .*b\.jsonl \(validation\) can be used: 1 because it does not"):
        prepare(config, byte_tokenizer(), tmp_path / "cache")


def test_bad_input_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "good"}\n{"text": \n')
    with pytest.raises(InputError, match=r"a\.jsonl line 3.*begins in line 2"):
        prepare(data_config(source=files(source)), byte_tokenizer(), tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("*.json")) == []
    write_lines(source, [{"text": "good"}, {"text": ["x"]}])
    with pytest.raises(InputError, match=r"a\.jsonl"):
        prepare(data_config(source=files(source)), byte_tokenizer(), tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("*.json")) == []


def test_an_empty_source_is_an_error_now_and_next_time(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_text("")
    for _ in range(2):
        with pytest.raises(InputError, match="has no rows"):
            prepare(data_config(source=files(tmp_path / "e.jsonl")), byte_tokenizer(), tmp_path / "cache")


def test_text_that_spells_eos_does_not_end_a_document(tmp_path: Path) -> None:
    source = write_texts(tmp_path, ["a <|endoftext|> b", "<|endoftext|>", "c"])
    own = {"source": files(write_texts(tmp_path, ["v"], "v.jsonl")), "fraction": None}
    data = prepare(data_config(source=files(source), validation=own), byte_tokenizer(), tmp_path / "cache").train
    assert (data.read(0, data.num_tokens)[0] == data.eos_id).sum() == data.num_documents == 3


def test_large_vocabularies_take_four_bytes(tmp_path: Path, shared_data: Path) -> None:
    path = str(shared_data / "tokenizers" / "qwen2.5")
    own = {"source": files(write_texts(tmp_path, ["v"], "v.jsonl")), "fraction": None}
    config = data_config(source=files(write_texts(tmp_path, ["日本語 and more"])), validation=own)
    tokenizer = load_tokenizer(
        FileTokenizer(kind="file", path=path, eos="<|endoftext|>", add_tokens=()), config, tmp_path
    )
    data = prepare(config, tokenizer, tmp_path / "cache").train
    assert data.read(0, data.num_tokens)[0].tolist() == [*tokenizer.encode("日本語 and more"), tokenizer.eos_id]
    assert tokenizer.eos_id > 65_535


def test_the_environment_and_the_console_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    prepare(data_config(format=MATHQA), byte_tokenizer(), tmp_path)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    assert capfd.readouterr() == ("", "")
