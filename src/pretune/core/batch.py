"""A batch of token ids: the data structure that packages pass to each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    reference: what a frozen model says of these sequences, by name, each tensor [B, ...]; None where the objective has
    none, or it is not computed yet. What there is of it, objectives/{preference,distillation}.py say.
    """

    inputs: Tensor
    targets: Tensor
    document_ids: Tensor | None
    reference: Mapping[str, Tensor] | None = None

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

    def tensors(self) -> list[Tensor]:
        """All tensors of the batch."""
        ids = [] if self.document_ids is None else [self.document_ids]
        return [self.inputs, self.targets, *ids, *(self.reference or {}).values()]

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        ids, reference = self.document_ids, self.reference
        return Batch(
            change(self.inputs),
            change(self.targets),
            None if ids is None else change(ids),
            None if reference is None else {name: change(tensor) for name, tensor in reference.items()},
        )
