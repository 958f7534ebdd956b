"""Prefetch batches: copy the next batch to the device while the current one is being used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pretune.core.batch import Batch


@dataclass(frozen=True)
class Prefetched:
    """A batch on the device with its counts, taken on the host so that the device need not be synchronized."""

    position: int
    batch: Batch
    scored: int
    """The number of scored items (tokens or pairs): the loss is divided by its total over a step."""
    scored_tokens: int


class Prefetcher:
    """Provides batches from `read(position, num_sequences)` on `device`, with the number of scored items from `count`.

    On CUDA, as soon as a batch is returned, the likely next one is read, pinned and copied on a separate stream, so
    that neither host nor device waits for it. Elsewhere batches are only read: that takes a thousandth of a step
    (benchmarks/loader_speed.py), too little to be worth hiding.
    """

    def __init__(self, read: Callable[[int, int], Batch], count: Callable[[Batch], int], device: torch.device) -> None:
        self._read, self._count, self._device = read, count, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: Prefetched | None = None

    def batch(self, position: int, num_sequences: int) -> Prefetched:
        """`num_sequences` sequences from `position` on; prefetches the same number of sequences after them."""
        ahead = self._ahead
        if ahead is None or (ahead.position, len(ahead.batch.inputs)) != (position, num_sequences):
            ahead = self._send(position, num_sequences)
        if self._stream is not None:
            self._arrive(ahead.batch)
            self._ahead = self._send(position + num_sequences, num_sequences)
        return ahead

    def _send(self, position: int, num_sequences: int) -> Prefetched:
        batch = self._read(position, num_sequences)
        counts = self._count(batch), batch.num_scored()
        if self._stream is None:
            return Prefetched(position, batch.to(self._device), *counts)
        with torch.cuda.stream(self._stream):
            return Prefetched(position, batch.pinned().to(self._device), *counts)

    def _arrive(self, batch: Batch) -> None:
        """Make the current stream wait for the copy of `batch`, and keep its memory until this stream has used it."""
        assert self._stream is not None
        here = torch.cuda.current_stream(self._device)
        here.wait_stream(self._stream)
        for tensor in batch.tensors():
            tensor.record_stream(here)
