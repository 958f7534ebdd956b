"""Rows of a data set in an order that is a pure function of seed, epoch and position: position is all the state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch

from pretune.core.batch import IGNORE, Batch
from pretune.core.config import InputError
from pretune.data.config import DataConfig
from pretune.data.packing import Rows, build_rows
from pretune.data.tokens import TokenData


class Loader:
    """Batches of one side of a run's data.

    Raises InputError when there is not a single row.
    """

    def __init__(self, data: TokenData, config: DataConfig, seed: int) -> None:
        self._data, self._rows = data, build_rows(data, config)
        self.num_rows: int = self._rows.num_rows
        self.report = self._rows.report
        if self.num_rows == 0:
            raise InputError(
                f"{data.name} ({data.side}) has not one row of {config.sequence_length} tokens: {data.num_documents:,} "
                f"documents, {data.num_tokens:,} tokens, packing {config.packing.mode}, {config.packing.too_long} what "
                "is too long; give more data, a longer data.sequence_length, or packing.too_long="
                + ("cut" if config.packing.mode == "pairs" else "split")
            )
        self._seed, self._shuffle = seed, config.shuffle
        self.length, self.eos_id = config.sequence_length, data.eos_id
        self.isolate = config.packing.isolate
        self._too_long, self._units = (
            config.packing.too_long,
            "pairs" if config.packing.mode == "pairs" else "documents",
        )
        assert data.reference is None or len(data.reference) == self.num_rows, "made for other rows"

    def batch(self, position: int, num_rows: int) -> Batch:
        """Rows `position` to `position + num_rows` of the endless sequence of epochs, each epoch in a new order.

        Rows may straddle epochs. Costs the same at any position.
        """
        rows = self._padding(num_rows)
        self.fill(np.arange(position, position + num_rows), rows, range(num_rows))
        return as_batch(rows)

    def fill(self, positions: np.ndarray, rows: Rows, places: Iterable[int]) -> None:
        """Write the rows at `positions` of the endless sequence into `rows`, at `places`."""
        epochs, numbers = np.divmod(positions, self.num_rows)
        if self._shuffle:
            for epoch in np.unique(epochs):
                chosen = epochs == epoch
                numbers[chosen] = shuffled(numbers[chosen], self.num_rows, self._seed, int(epoch))
        self._fill(numbers.tolist(), rows, places)

    def batches(self, micro_batch: int) -> Iterator[Batch]:
        """Every row once and in order, `micro_batch` at a time; the last batch is filled up with unscored rows."""
        for start in range(0, self.num_rows, micro_batch):
            rows = self._padding(micro_batch)
            self._fill(range(start, min(start + micro_batch, self.num_rows)), rows, range(micro_batch))
            yield as_batch(rows)

    def figures(self) -> dict[str, int]:
        """What training does not see of the data: rows left out, documents longer than a row, and their tokens lost."""
        left_out, report = self._data.skipped.total(), self.report
        return {
            "data/rows_left_out": left_out,
            "data/too_long": report["too_long"],
            "data/lost_tokens": report["lost_tokens"],
        }

    def notes(self) -> list[str]:
        """The same in words; empty where nothing is missing."""
        left_out, too_long, lost = self.figures().values()
        done = {"cut": "cut", "split": "split", "drop": "dropped"}[self._too_long]
        notes = [f"{left_out:,} rows left out"] if left_out else []
        if too_long:
            notes.append(f"{too_long:,} {self._units} longer than a row ({done}; {lost:,} tokens lost)")
        return notes

    def _fill(self, numbers: Iterable[int], rows: Rows, places: Iterable[int]) -> None:
        # Rows that are not isolated stay one document, also where a mixture has ids for others.
        own = rows if self.isolate else Rows(rows.inputs, rows.targets, None)
        for number, place in zip(numbers, places, strict=False):
            self._rows.fill(number, own, place)
            if rows.reference is not None and self._data.reference is not None:
                rows.reference[place] = self._data.reference[number]

    def _padding(self, num_rows: int) -> Rows:
        rows = padding(num_rows, self.length, self.eos_id, self.isolate)
        if self._data.reference is None:
            return rows
        return replace(rows, reference=np.zeros((num_rows, *self._data.reference.shape[1:]), dtype=np.float32))


def padding(num_rows: int, length: int, eos_id: int, isolate: bool) -> Rows:
    """Rows to fill in: EOS that is not scored."""
    shape = (num_rows, length)
    documents = np.zeros(shape, dtype=np.int32) if isolate else None
    return Rows(np.full(shape, eos_id, dtype=np.int64), np.full(shape, IGNORE, dtype=np.int64), documents)


def as_batch(rows: Rows) -> Batch:
    """The same memory as tensors."""
    ids, reference = (None if one is None else torch.from_numpy(one) for one in (rows.documents, rows.reference))
    return Batch(torch.from_numpy(rows.inputs), torch.from_numpy(rows.targets), ids, reference)


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
