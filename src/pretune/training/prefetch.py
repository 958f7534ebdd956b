"""Batches on the device by the time that they are needed: the next one travels while this one is computed with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pretune.core.batch import Batch


@dataclass(frozen=True)
class Prefetched:
    """A batch on the device, and how many of its positions are scored: counted on the host, which need not wait."""

    position: int
    batch: Batch
    scored: int
    """What its loss is divided by."""
    scored_tokens: int


class Prefetcher:
    """Batches from `read(position, num_sequences)`, on `device`, with what `count` finds scored in them.

    On CUDA the batch that is likely to come next is read, pinned and copied on a stream of its own as soon as one is
    handed out, so that neither host nor device waits for it. Elsewhere reading is all there is: it takes a thousandth
    of a step (benchmarks/loader_speed.py), too little to hide.
    """

    def __init__(self, read: Callable[[int, int], Batch], count: Callable[[Batch], int], device: torch.device) -> None:
        self._read, self._count, self._device = read, count, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: Prefetched | None = None

    def batch(self, position: int, num_sequences: int) -> Prefetched:
        """`num_sequences` sequences from `position` on; the guess is that the sequences after them come next."""
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
        """Let what is computed from here on wait for `batch`, and its memory for what is computed with it."""
        assert self._stream is not None
        here = torch.cuda.current_stream(self._device)
        here.wait_stream(self._stream)
        for tensor in (batch.inputs, batch.targets, batch.document_ids, batch.reference):
            if tensor is not None:
                tensor.record_stream(here)
