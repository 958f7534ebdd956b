"""What the rooms pass to each other: a batch of token ids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
"""Target of a position that is not scored."""


@dataclass(frozen=True)
class Batch:
    """`B` rows of `T` tokens.

    inputs [B, T] int64; targets [B, T] int64: the token that follows each input, or IGNORE where it is not scored;
    document_ids [B, T] int32, or None: which document of its row each input belongs to. With ids, no position attends
    to another document and positions restart with each; padding has an id of its own.
    """

    inputs: Tensor
    targets: Tensor
    document_ids: Tensor | None

    def to(self, device: torch.device) -> Batch:
        """A copy on `device`; from pinned memory the copy does not block the host."""
        documents = None if self.document_ids is None else self.document_ids.to(device, non_blocking=True)
        inputs = self.inputs.to(device, non_blocking=True)
        return Batch(inputs, self.targets.to(device, non_blocking=True), documents)

    def pinned(self) -> Batch:
        """A copy in host memory that stays where it is: a GPU reads it by itself."""
        documents = None if self.document_ids is None else self.document_ids.pin_memory()
        return Batch(self.inputs.pin_memory(), self.targets.pin_memory(), documents)

    def rows(self, start: int, stop: int) -> Batch:
        """Rows `start` to `stop` (exclusive): a micro-batch."""
        documents = None if self.document_ids is None else self.document_ids[start:stop]
        return Batch(self.inputs[start:stop], self.targets[start:stop], documents)

    def num_scored(self) -> int:
        """How many positions of the batch are scored."""
        return int((self.targets != IGNORE).sum())
