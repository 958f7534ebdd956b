"""Rows of a data set in an order that is a pure function of seed, epoch and position: position is all the state."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from pretune.batch import IGNORE, Batch
from pretune.config import InputError
from pretune.data.config import DataConfig
from pretune.data.packing import Rows, build_rows
from pretune.data.tokens import TokenData


class Loader:
    """Batches of one side of a run's data.

    Raises InputError when there is not a single row.
    """

    def __init__(self, data: TokenData, config: DataConfig, seed: int) -> None:
        self._rows = build_rows(data, config)
        self.num_rows: int = self._rows.num_rows
        self.report = self._rows.report
        if self.num_rows == 0:
            raise InputError(
                f"{data.name} ({data.side}) has not one row of {config.sequence_length} tokens: {data.num_documents:,} "
                f"documents, {data.num_tokens:,} tokens, packing {config.packing.mode}, {config.packing.too_long} what "
                "is too long; give more data, a longer data.sequence_length, or data.packing.too_long=split"
            )
        self._seed, self._shuffle = seed, config.shuffle
        self._length, self._eos_id = config.sequence_length, data.eos_id
        self._isolate = config.packing.isolate

    def batch(self, position: int, num_rows: int) -> Batch:
        """Rows `position` to `position + num_rows` of the endless sequence of epochs, each epoch in a new order.

        Rows may straddle epochs. Costs the same at any position.
        """
        numbers = np.arange(position, position + num_rows)
        epochs, rows = np.divmod(numbers, self.num_rows)
        if self._shuffle:
            rows = np.concatenate(
                [shuffled(rows[epochs == epoch], self.num_rows, self._seed, int(epoch)) for epoch in np.unique(epochs)]
            )
        return self._batch(rows.tolist(), num_rows)

    def batches(self, micro_batch: int) -> Iterator[Batch]:
        """Every row once and in order, `micro_batch` at a time; the last batch is filled up with unscored rows."""
        for start in range(0, self.num_rows, micro_batch):
            yield self._batch(list(range(start, min(start + micro_batch, self.num_rows))), micro_batch)

    def _batch(self, row_numbers: list[int], num_rows: int) -> Batch:
        shape = (num_rows, self._length)
        inputs = np.full(shape, self._eos_id, dtype=np.int64)
        targets = np.full(shape, IGNORE, dtype=np.int64)
        documents = np.zeros(shape, dtype=np.int32) if self._isolate else None
        rows = Rows(inputs, targets, documents)
        for at, row in enumerate(row_numbers):
            self._rows.fill(row, rows, at)
        ids = None if documents is None else torch.from_numpy(documents)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), ids)


def shuffled(rows: np.ndarray, num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Where the permutation of (seed, epoch) takes each of `rows`: a bijection of range(num_rows).

    A Feistel network over the next power of four, walked until it lands inside the range. It needs no memory and no
    set-up however many rows there are, and does not depend on a library's random numbers.
    """
    half = max(1, (int(num_rows - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = _mix(
        np.arange(8, dtype=np.uint64)
        + _mix(np.array([seed % 2**64], dtype=np.uint64))
        + _mix(np.array([~epoch % 2**64], dtype=np.uint64))
    )
    walking = rows.astype(np.uint64)
    outside = np.ones(len(rows), dtype=bool)
    while outside.any():
        left, right = walking[outside] >> np.uint64(half), walking[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        walking[outside] = left << np.uint64(half) | right
        outside = walking >= num_rows
    return walking.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """A well-mixed 64-bit hash of each value: the finalizer of SplitMix64, with its wrapping arithmetic."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
