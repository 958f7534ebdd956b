"""Load batches in an order that is a pure function of seed, epoch and position, so the position is the only state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch

from pretune.core.batch import IGNORE, Batch
from pretune.core.config import InputError
from pretune.data.config import DataConfig
from pretune.data.hashing import mix
from pretune.data.packing import Sequences, build_sequences
from pretune.data.tokens import TokenData


class Loader:
    """Batches of one side (training or validation) of a run's data.

    Raises InputError if there are no sequences.
    """

    def __init__(self, data: TokenData, config: DataConfig, seed: int) -> None:
        self._data, self._sequences = data, build_sequences(data, config)
        self.num_sequences: int = self._sequences.num_sequences
        self.report = self._sequences.report
        if self.num_sequences == 0:
            raise InputError(
                f"{data.name} ({data.side}) does not give one sequence of {config.sequence_length} tokens: "
                f"{data.num_documents:,} documents, {data.num_tokens:,} tokens, packing.mode={config.packing.mode}, "
                f"packing.too_long={config.packing.too_long}; use more data, a longer data.sequence_length, or "
                f"packing.too_long={'cut' if config.packing.mode == 'pairs' else 'split'}"
            )
        self._seed, self._shuffle = seed, config.shuffle
        self.length, self.eos_id = config.sequence_length, data.eos_id
        self.isolate = config.packing.isolate
        self._too_long, self._units = (
            config.packing.too_long,
            "pairs" if config.packing.mode == "pairs" else "documents",
        )
        self.reference = data.reference
        tables = (data.reference or {}).values()
        assert all(len(table) == self.num_sequences for table in tables), "made for other sequences"

    def batch(self, position: int, num_sequences: int) -> Batch:
        """Sequences `position` to `position + num_sequences` of the endless stream of epochs, each in a new order.

        A batch may span epochs. The cost is the same at any position.
        """
        sequences = self._padding(num_sequences)
        self.fill(np.arange(position, position + num_sequences), sequences, range(num_sequences))
        return as_batch(sequences)

    def fill(self, positions: np.ndarray, sequences: Sequences, places: Iterable[int]) -> None:
        """Write the sequences at `positions` in the endless stream into rows `places` of `sequences`."""
        epochs, numbers = np.divmod(positions, self.num_sequences)
        if self._shuffle:
            for epoch in np.unique(epochs):
                chosen = epochs == epoch
                numbers[chosen] = shuffled(numbers[chosen], self.num_sequences, self._seed, int(epoch))
        self._fill(numbers.tolist(), sequences, places)

    def batches(self, micro_batch: int) -> Iterator[Batch]:
        """Every sequence once and in order, `micro_batch` at a time; the last batch is padded with unscored rows."""
        for start in range(0, self.num_sequences, micro_batch):
            sequences = self._padding(micro_batch)
            self._fill(range(start, min(start + micro_batch, self.num_sequences)), sequences, range(micro_batch))
            yield as_batch(sequences)

    def metrics(self) -> dict[str, int]:
        """Metrics of data that training does not see: rows left out, documents that are too long, tokens lost."""
        left_out, report = self._data.skipped.total(), self.report
        return {
            "data/rows_left_out": left_out,
            "data/too_long": report["too_long"],
            "data/lost_tokens": report["lost_tokens"],
        }

    def notes(self) -> list[str]:
        """The same as text; empty if nothing is left out."""
        left_out, too_long, lost = self.metrics().values()
        done = {"cut": "cut", "split": "split", "drop": "dropped"}[self._too_long]
        notes = [f"{left_out:,} rows left out"] if left_out else []
        if too_long:
            notes.append(f"{too_long:,} {self._units} longer than a sequence ({done}; {lost:,} tokens lost)")
        return notes

    def _fill(self, numbers: Iterable[int], sequences: Sequences, places: Iterable[int]) -> None:
        # Without isolation a sequence stays one document, even if other sets in a mixture need document ids.
        own = sequences if self.isolate else Sequences(sequences.inputs, sequences.targets, None)
        for number, place in zip(numbers, places, strict=False):
            self._sequences.fill(number, own, place)
            if sequences.reference is not None and self.reference is not None:
                for name, table in self.reference.items():
                    sequences.reference[name][place] = table[number]

    def _padding(self, num_sequences: int) -> Sequences:
        return padding(num_sequences, self.length, self.eos_id, self.isolate, self.reference)


def padding(
    num_sequences: int, length: int, eos_id: int, isolate: bool, tables: Mapping[str, np.ndarray] | None
) -> Sequences:
    """Sequences to be filled in: unscored EOS tokens. `tables`: where the reference, if any, is read from."""
    shape = (num_sequences, length)
    documents = np.zeros(shape, dtype=np.int32) if isolate else None
    reference = None
    if tables is not None:
        reference = {name: _empty(num_sequences, table) for name, table in tables.items()}
    inputs, targets = np.full(shape, eos_id, dtype=np.int64), np.full(shape, IGNORE, dtype=np.int64)
    return Sequences(inputs, targets, documents, reference)


def _empty(num_sequences: int, table: np.ndarray) -> np.ndarray:
    # torch computes with few operations on unsigned integers, in which ids take half the space on disk.
    dtype = np.int32 if table.dtype == np.uint16 else table.dtype
    return np.zeros((num_sequences, *table.shape[1:]), dtype=dtype)


def as_batch(sequences: Sequences) -> Batch:
    """The sequences as a batch of tensors that share their memory."""
    ids = None if sequences.documents is None else torch.from_numpy(sequences.documents)
    reference = None
    if sequences.reference is not None:
        reference = {name: torch.from_numpy(values) for name, values in sequences.reference.items()}
    return Batch(torch.from_numpy(sequences.inputs), torch.from_numpy(sequences.targets), ids, reference)


def shuffled(numbers: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """Apply the pseudorandom permutation of range(count) for (seed, epoch) to each of `numbers`.

    A Feistel network (a permutation for any round function) permutes the integers below the next power of four; results
    outside the range go through it again until they fall inside (cycle walking), which makes it a permutation of
    range(count). Unlike a shuffled array it needs no memory and no setup, so resuming anywhere in a trillion tokens is
    immediate, and it does not depend on a library's random numbers.
    """
    half = max(1, (int(count - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = mix(
        np.arange(8, dtype=np.uint64)
        + mix(np.array([seed % 2**64], dtype=np.uint64))
        + mix(np.array([~epoch % 2**64], dtype=np.uint64))
    )
    walking = numbers.astype(np.uint64)
    outside = np.ones(len(numbers), dtype=bool)
    while outside.any():
        left, right = walking[outside] >> np.uint64(half), walking[outside] & mask
        for key in keys:
            left, right = right, left ^ (mix(right + key) & mask)
        walking[outside] = left << np.uint64(half) | right
        outside = walking >= count
    return walking.astype(np.int64)
