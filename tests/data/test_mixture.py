from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_data import byte_tokenizer, data_config, files, write_texts

from pretune.core.config import ConfigError
from pretune.data.config import DataConfig
from pretune.data.loader import Loader
from pretune.data.mixture import Mixture, evenly, training_loader
from pretune.data.shards import Prepared, prepare

TEXT = {"kind": "text", "column": "text"}
STREAM = {"mode": "stream", "too_long": "split", "isolate": False}
WHOLE = {"mode": "documents", "too_long": "drop", "isolate": True}


@given(st.lists(st.integers(1, 200), min_size=1, max_size=4))
def test_a_cycle_has_every_rank_of_every_set_once_and_never_lags_far(counts: list[int]) -> None:
    shares = np.array(counts)
    owners, ranks = evenly(shares)
    for owner, count in enumerate(counts):
        assert ranks[owners == owner].tolist() == list(range(count))
        had = np.cumsum(owners == owner)
        expected = np.arange(1, len(owners) + 1) * count / len(owners)
        assert np.abs(had - expected).max() < len(counts)


def spelt(number: int, letter: str) -> str:
    """A number in binary, with lower-case letters for 0 and capitals for 1."""
    return format(number, "07b").replace("0", letter).replace("1", letter.upper())


def part(folder: Path, name: str, share: float, **changes: Any) -> dict[str, Any]:
    """A data set of sixty texts."""
    source = files(write_texts(folder, [spelt(number, name) * 6 for number in range(60)], f"{name}.jsonl"))
    validation = {"source": None, "fraction": 0.2, "seed": 3, "group_by": None}
    return {"share": share, "source": source, "validation": validation, "format": TEXT, "packing": STREAM} | changes


def mixed(folder: Path, mix: dict[str, Any], **changes: Any) -> tuple[DataConfig, Prepared]:
    texts = files(write_texts(folder, [spelt(number, "m") * 2 for number in range(90)], "main.jsonl"))
    config = data_config(source=texts, mix=mix, **changes)
    return config, prepare(config, byte_tokenizer(), folder / "cache")


def owner(row: torch.Tensor) -> str:
    """The data set that a sequence of bytes comes from: the letter that only this set has."""
    text = byte_tokenizer().decode(row.tolist())
    return next(letter for letter in "xym" if letter in text.lower())


def test_rows_come_in_their_shares_at_every_place(tmp_path: Path) -> None:
    config, data = mixed(tmp_path, {"x": part(tmp_path, "x", 0.25), "y": part(tmp_path, "y", 0.05)})
    rows = training_loader(data, config, seed=1)
    owners = [owner(row) for row in rows.batch(0, 400).inputs]
    for letter, share in (("x", 0.25), ("y", 0.05), ("m", 0.7)):
        had = np.cumsum([one == letter for one in owners])
        assert np.abs(had - share * np.arange(1, 401)).max() < 2


def test_position_is_all_the_state_of_a_mixture(tmp_path: Path) -> None:
    config, data = mixed(tmp_path, {"x": part(tmp_path, "x", 0.1)})
    rows = training_loader(data, config, seed=1)
    straight = rows.batch(0, 3 * rows.num_sequences)
    for position, count in ((0, 7), (5, 20), (rows.num_sequences - 3, 8), (2 * rows.num_sequences, rows.num_sequences)):
        assert torch.equal(rows.batch(position, count).inputs, straight.inputs[position : position + count])
        assert torch.equal(rows.batch(position, count).targets, straight.targets[position : position + count])
    other = training_loader(data, config, seed=2)
    assert not torch.equal(other.batch(0, rows.num_sequences).inputs, straight.inputs[: rows.num_sequences])


def test_each_set_goes_through_all_of_its_rows_in_its_own_order(tmp_path: Path) -> None:
    config, data = mixed(tmp_path, {"x": part(tmp_path, "x", 0.5)})
    rows = training_loader(data, config, seed=1)
    for letter, section, tokens in (("m", config, data.train), ("x", config.part("x"), data.parts["x"].train)):
        alone = Loader(tokens, section, seed=1)
        own = [row for row in rows.batch(0, 4 * alone.num_sequences).inputs if owner(row) == letter]
        assert torch.equal(torch.stack(own), alone.batch(0, len(own)).inputs)


def test_without_a_mix_it_is_the_loader_itself(tmp_path: Path) -> None:
    config, data = mixed(tmp_path, {})
    assert isinstance(training_loader(data, config, seed=1), Loader)
    assert data.parts == {}


def test_sets_keep_their_own_packing(tmp_path: Path) -> None:
    config, data = mixed(tmp_path, {"x": part(tmp_path, "x", 0.5)}, packing=WHOLE, sequence_length=64)
    rows = training_loader(data, config, seed=1)
    assert isinstance(rows, Mixture)
    batch = rows.batch(0, 40)
    assert batch.document_ids is not None
    for row, ids in zip(batch.inputs, batch.document_ids, strict=True):
        # Texts of the stream are one document to attention; records of the main set are isolated.
        assert (ids.max() == 0) == (owner(row) == "x")


def test_what_no_row_has_is_told_for_each_set(tmp_path: Path) -> None:
    mix = {"x": part(tmp_path, "x", 0.1, packing=WHOLE | {"too_long": "cut"})}
    config, data = mixed(tmp_path, mix, sequence_length=32)
    metrics = training_loader(data, config, seed=1).metrics()
    documents = data.parts["x"].train.num_documents
    assert (metrics["data/too_long"], metrics["data_x/too_long"]) == (0, documents)
    assert metrics["data_x/lost_tokens"] > 0
    (note,) = training_loader(data, config, seed=1).notes()
    assert note.startswith(f"x: {documents} documents longer than a sequence (cut; ")


def test_nothing_is_measured_on_what_any_set_trains_on(tmp_path: Path) -> None:
    x = part(tmp_path, "x", 0.1)
    own = {"source": x["source"], "fraction": None}
    with pytest.raises(ConfigError, match=r"data\.validation\.source has .*x\.jsonl, and so has data\.mix\.x\.source"):
        mixed(tmp_path, {"x": x}, validation=own)
    both = r"data\.mix\.x\.source and data\.mix\.y\.source both have .*x\.jsonl, but hold out other rows of it"
    with pytest.raises(ConfigError, match=both):
        mixed(tmp_path, {"x": x, "y": x | {"validation": x["validation"] | {"seed": 4}}})
    mixed(tmp_path, {"x": x, "y": x})


def test_shares_leave_something_for_the_source(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the shares in mix sum to 1\.1"):
        data_config(mix={"x": part(tmp_path, "x", 0.6), "y": part(tmp_path, "y", 0.5)})
    with pytest.raises(ConfigError, match=r"'mix\.x\.share' = 0\.0: .*0\.001"):
        data_config(mix={"x": part(tmp_path, "x", 0.0)})
    with pytest.raises(ConfigError, match=r"unknown key 'mix\.x\.shar'; did you mean 'share'"):
        data_config(mix={"x": part(tmp_path, "x", 0.1) | {"shar": 1}})
    with pytest.raises(ConfigError, match=r"unknown key 'mix\.x\.source\.file'; did you mean 'files'"):
        data_config(mix={"x": part(tmp_path, "x", 0.1, source=files("a.jsonl") | {"file": "b"})})
