"""A batch of token ids: the data structure that packages pass to each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
"""Target of a position that is masked out of the loss."""


@dataclass(frozen=True)
class Batch:
    """`B` sequences of `T` tokens.

    inputs [B, T] int64; targets [B, T] int64: the token that follows each input, or IGNORE where it is not scored;
    document_ids [B, T] int32, or None: the document within its sequence that each input belongs to. With ids, no
    position attends to another document and positions restart at each; padding has its own id. In preference data,
    documents 2 k and 2 k + 1 are the chosen and the rejected side of pair k.
    reference_log_probs [B, P, 2] float32, or None: log-probabilities of these sides under the reference model, in nats;
    P is at least the largest number of pairs in a sequence, and entries without a pair are undefined.
    """

    inputs: Tensor
    targets: Tensor
    document_ids: Tensor | None
    reference_log_probs: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """A copy on `device`; copying from pinned memory to CUDA does not block the host."""

        def move(tensor: Tensor) -> Tensor:
            # On MPS a non-blocking copy may read memory that the host has already reused (pytorch#139550).
            return tensor.to(device, non_blocking=device.type == "cuda")

        return self._each(move)

    def pinned(self) -> Batch:
        """A copy in pinned (page-locked) host memory, which a GPU can read directly."""
        return self._each(Tensor.pin_memory)

    def part(self, start: int, stop: int) -> Batch:
        """Sequences `start` to `stop` (exclusive): a micro-batch."""
        return self._each(lambda tensor: tensor[start:stop])

    def num_scored(self) -> int:
        """The number of positions that are scored."""
        return int((self.targets != IGNORE).sum())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        ids, log_probs = self.document_ids, self.reference_log_probs
        optional = (None if tensor is None else change(tensor) for tensor in (ids, log_probs))
        return Batch(change(self.inputs), change(self.targets), *optional)
