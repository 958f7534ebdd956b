"""What the rooms pass to each other: a batch of token ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
"""Target of a position that is not scored."""


@dataclass(frozen=True)
class Batch:
    """`B` sequences of `T` tokens.

    inputs [B, T] int64; targets [B, T] int64: the token that follows each input, or IGNORE where it is not scored;
    document_ids [B, T] int32, or None: which document of its sequence each input belongs to. With ids, no position
    attends to another document and positions restart with each; padding has an id of its own. In preference data the
    documents 2 k and 2 k + 1 are the chosen and the rejected side of pair k.
    reference [B, P, 2] float32, or None: what another model gives these sides, in nats; P is at least the most pairs
    that a sequence holds, and what belongs to no pair is without meaning.
    """

    inputs: Tensor
    targets: Tensor
    document_ids: Tensor | None
    reference: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """A copy on `device`; to CUDA from pinned memory, the copy does not block the host."""

        def move(tensor: Tensor) -> Tensor:
            # Apple's GPU would read memory that the host has used for something else by then (pytorch#139550).
            return tensor.to(device, non_blocking=device.type == "cuda")

        return self._each(move)

    def pinned(self) -> Batch:
        """A copy in host memory that stays where it is: a GPU reads it by itself."""
        return self._each(Tensor.pin_memory)

    def part(self, start: int, stop: int) -> Batch:
        """Sequences `start` to `stop` (exclusive): a micro-batch."""
        return self._each(lambda tensor: tensor[start:stop])

    def num_scored(self) -> int:
        """How many positions of the batch are scored."""
        return int((self.targets != IGNORE).sum())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        optional = (None if tensor is None else change(tensor) for tensor in (self.document_ids, self.reference))
        return Batch(change(self.inputs), change(self.targets), *optional)
