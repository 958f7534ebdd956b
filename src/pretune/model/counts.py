"""The number of trainable parameters and of all parameters."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


class Counts(NamedTuple):
    trainable: int
    total: int


def count_parameters(model: nn.Module) -> Counts:
    """Count trainable and all parameters, including adapters; shared ones once."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return Counts(sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes))
