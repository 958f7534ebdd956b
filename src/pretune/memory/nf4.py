"""Layers in 4 bits for a rehearsal without values: as many bytes as the real ones, put together as often."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretune.quantization.nf4 import NF4Linear, frozen_layers, stored_bytes


def store(model: nn.Module, block_size: int) -> None:
    """Make them of the frozen linear layers of `model`, which is on the meta device."""
    for layer in frozen_layers(model).values():
        size = stored_bytes(layer.weight.numel(), block_size)
        layer.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
        layer.__class__ = _Stored


class _Stored(NF4Linear):
    def stored(self) -> tuple[Tensor, ...]:
        return (self.weight,)

    def expand(self, stored: tuple[Tensor, ...], after: Tensor | None) -> Tensor:
        first = stored[0][:1].float()
        if after is not None:
            first = first + after.flatten()[:1].float()
        return first.expand(self.out_features, self.in_features).contiguous()
