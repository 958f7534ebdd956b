from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_data import byte_tokenizer, data_config, files, write_texts

from pretune.data.loader import Loader, shuffled
from pretune.data.shards import prepare


@given(st.integers(1, 3000), st.integers(-(2**63), 2**64), st.integers(0, 10**6))
def test_an_order_is_a_permutation(num_sequences: int, seed: int, epoch: int) -> None:
    order = shuffled(np.arange(num_sequences), num_sequences, seed, epoch)
    assert np.array_equal(np.sort(order), np.arange(num_sequences))


def test_orders_look_random_and_differ_by_seed_and_epoch() -> None:
    rows = np.arange(20_000)
    orders = [shuffled(rows, len(rows), seed, epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    for order in orders:
        assert abs(np.corrcoef(rows, order)[0, 1]) < 0.03
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])


@pytest.fixture
def loader(tmp_path: Path) -> Loader:
    texts = [f"{number:05d} is document number {number}" for number in range(200)]
    config = data_config(source=files(write_texts(tmp_path, texts)))
    return Loader(prepare(config, byte_tokenizer(), tmp_path).train, config, seed=4)


def test_position_is_all_the_state(loader: Loader) -> None:
    rows = 2 * loader.num_sequences + 5
    straight = torch.cat([loader.batch(at, 1).inputs for at in range(rows)])
    assert torch.equal(loader.batch(0, rows).inputs, straight)
    assert torch.equal(
        loader.batch(loader.num_sequences - 3, 8).inputs, straight[loader.num_sequences - 3 : loader.num_sequences + 5]
    )


def test_each_epoch_reads_every_row_once_in_a_new_order(loader: Loader) -> None:
    def epoch(number: int) -> list[tuple[int, ...]]:
        return [tuple(row) for row in loader.batch(number * loader.num_sequences, loader.num_sequences).inputs.tolist()]

    in_order = [tuple(row) for batch in loader.batches(1) for row in batch.inputs.tolist()]
    assert sorted(epoch(0)) == sorted(epoch(1)) == sorted(in_order)
    assert len({tuple(epoch(0)), tuple(epoch(1)), tuple(in_order)}) == 3


def test_evaluation_reads_everything_once_and_fills_up_with_what_is_not_scored(loader: Loader) -> None:
    whole = sum(batch.num_scored() for batch in loader.batches(1))
    batches = list(loader.batches(7))
    assert all(len(batch.inputs) == 7 for batch in batches)
    assert sum(batch.num_scored() for batch in batches) == whole
    assert len(batches) == -(-loader.num_sequences // 7)
