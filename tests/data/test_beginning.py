"""Documents of a tokenizer that puts a BOS before a text: in shards, sequences, losses and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published import BEGINNINGS, FAMILIES, model_folder
from small_data import data_config, files, write_lines, write_texts

from pretune.core.batch import IGNORE
from pretune.core.config import validate
from pretune.data.config import DataConfig, FileTokenizer
from pretune.data.formats.segments import Segment
from pretune.data.loader import Loader
from pretune.data.shards import Prepared, prepare
from pretune.data.tokenizer import Tokenizer, load_tokenizer

TEXTS = ["The mat: " + " ".join("cat" if number >> bit & 1 else "dogs" for bit in range(6)) for number in range(40)]
"""Made of words that all of the tokenizers know, so that no two are the same tokens."""
ROWS = [{"prompt": f"Add {number} and 1:", "completion": f" {number + 1}"} for number in range(40)]


def prepared(tmp_path: Path, family: str, **changes: Any) -> tuple[DataConfig, Tokenizer, Prepared]:
    folder = model_folder(tmp_path / family, family)
    section = {"kind": "file", "path": str(folder), "eos": None, "add_tokens": []}
    source = files(write_texts(tmp_path, TEXTS) if "format" not in changes else write_lines(tmp_path / "rows", ROWS))
    config = data_config(source=source | {"format": "json"}, tokenizer=section, **changes)
    tokenizer = load_tokenizer(validate(FileTokenizer, section), config, tmp_path)
    return config, tokenizer, prepare(config, tokenizer, tmp_path / "cache")


def documents(data: Prepared) -> list[tuple[list[int], list[bool]]]:
    """The ids and the flags of each training document."""
    ends = data.train.document_ends.tolist()
    found = []
    for start, stop in zip([0, *ends], ends, strict=False):
        tokens, scored = data.train.read(start, stop)
        found.append((tokens.tolist(), [True] * len(tokens) if scored is None else scored.tolist()))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_each_document_begins_with_it_unscored_and_ends_in_one_eos(tmp_path: Path, family: str) -> None:
    _, tokenizer, data = prepared(tmp_path, family)
    begins = [tokenizer.backend.token_to_id(BEGINNINGS[family])] if family in BEGINNINGS else []
    texts = {(*begins, *tokenizer.encode(text), tokenizer.eos_id) for text in TEXTS}
    for tokens, scored in documents(data):
        assert tuple(tokens) in texts
        assert scored == [False] * len(begins) + [True] * (len(tokens) - len(begins))
    whole = sum(len(text.encode()) for text in TEXTS)
    assert data.train.num_bytes + data.validation.num_bytes == whole
    assert data.train.num_scored == data.train.num_tokens - len(begins) * data.train.num_documents
    lengths = tokenizer.token_bytes()
    assert lengths[[*begins, tokenizer.eos_id]].sum() == 0


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("mode", ["stream", "documents", "none"])
def test_it_is_never_a_target_and_the_first_token_of_the_text_is_one(tmp_path: Path, mode: str, isolate: bool) -> None:
    packing = {"mode": mode, "isolate": isolate, "too_long": "split"}
    config, tokenizer, data = prepared(tmp_path, "llama3", packing=packing, sequence_length=64)
    (begin,) = tokenizer.beginning
    batch = Loader(data.train, config, 0).batch(0, 8)
    inputs, targets = batch.inputs.numpy(), batch.targets.numpy()
    assert not (targets == begin).any()
    at = np.argwhere(inputs == begin)
    assert len(at) >= 8
    for row, column in at:
        following = inputs[row, column + 1] if column + 1 < inputs.shape[1] else targets[row, column]
        assert targets[row, column] == following != IGNORE
        before = targets[row, column - 1] if column else IGNORE
        assert before == IGNORE
        if batch.document_ids is not None and column:
            assert batch.document_ids[row, column] != batch.document_ids[row, column - 1]


def test_a_prompt_is_not_scored_and_follows_it(tmp_path: Path) -> None:
    format = {"kind": "prompt_completion", "prompt": "prompt", "completion": "completion", "parse_special": False}
    _, tokenizer, data = prepared(tmp_path, "gemma", format=format | {"score_prompt": False})
    for tokens, scored in documents(data):
        prompt = tokenizer.encode_segments([Segment(tokenizer.decode(tokens).split(":")[0] + ":", False)])[0]
        assert tokens[: len(prompt) + 1] == [*tokenizer.beginning, *prompt]
        assert scored == [at > len(prompt) for at in range(len(tokens))]


def test_text_that_was_rendered_already_gets_no_second_one(tmp_path: Path) -> None:
    rows = [{"text": f"<s>[INST] {number} [/INST] yes </s>"} for number in range(40)]
    folder = model_folder(tmp_path / "llama2", "llama2")
    section = {"kind": "file", "path": str(folder), "eos": None, "add_tokens": []}
    for parsed, wanted in ((True, 1), (False, 1)):
        config = data_config(
            source=files(write_lines(tmp_path / "rows.jsonl", rows)), tokenizer=section,
            format={"kind": "text", "column": "text", "parse_special": parsed},
        )  # fmt: skip
        tokenizer = load_tokenizer(validate(FileTokenizer, section), config, tmp_path)
        for tokens, _ in documents(prepare(config, tokenizer, tmp_path / "cache")):
            assert tokens[0] == 1
            assert tokens.count(1) == wanted
            assert tokens.count(2) == 1


def test_prepared_data_depends_on_it(tmp_path: Path) -> None:
    _, with_it, data = prepared(tmp_path, "llama2")
    with_it.backend.post_processor = None
    without = Tokenizer(with_it.backend, with_it.eos, with_it.bos)
    config = data_config(source=files(tmp_path / "texts.jsonl") | {"format": "json"})
    assert without.beginning == ()
    assert (
        without.fingerprint
        != load_tokenizer(
            validate(FileTokenizer, {"kind": "file", "path": str(tmp_path / "llama2"), "eos": None, "add_tokens": []}),
            config,
            tmp_path,
        ).fingerprint
    )
    other = prepare(config, without, tmp_path / "cache")
    assert other.folder != data.folder
    assert other.train.num_tokens == data.train.num_tokens - data.train.num_documents
