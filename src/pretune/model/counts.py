"""How much of a model is trained."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


class Counts(NamedTuple):
    trainable: int
    total: int


def count_parameters(model: nn.Module) -> Counts:
    """How many parameters are trained, and how many there are, adapters included; shared ones once."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return Counts(sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes))
