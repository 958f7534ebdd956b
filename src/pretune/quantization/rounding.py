"""Rounding of weights and activations to integers times a scale, with a straight-through gradient.

Weights are symmetric: a weight is an integer of `bits` bits times the scale of its group. Activations have 8 bits, with
a scale and a zero point per token that cover all of its values. Scales are computed as in torchao; scales of groups are
also rounded to bfloat16, as XNNPACK's 4-bit matrices store them, so that a phone computes with exactly the same values.

E rows, D columns, G groups in a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pretune.quantization.config import FakeQuantizationConfig, Int8Int4Config, Int8WeightOnlyConfig, QatConfig


@dataclass(frozen=True)
class Grid:
    """How a matrix is rounded: integers of `bits` bits, one scale per `group_size` adjacent weights or (None) per
    row."""

    bits: int
    group_size: int | None

    @property
    def bounds(self) -> tuple[int, int]:
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1


def grids(model: nn.Module, config: FakeQuantizationConfig) -> dict[str, Grid]:
    """The linear layers and tables of `model` that are stored as integers, by name, each with its grid.

    For a layer with an adapter, this is its base layer.
    """
    inside = Grid(8, None) if isinstance(config, Int8WeightOnlyConfig) else Grid(4, config.group_size)
    named = {"int4": Grid(4, config.group_size), "int8": Grid(8, None), "none": None}
    found: dict[str, Grid | None] = {}
    for name, module in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Embedding):
            found[name] = named[config.embedding]
        elif isinstance(module, nn.Linear) and not isinstance(
            parent, nn.ModuleDict
        ):  # a ModuleDict holds an adapter's factors
            found[name] = inside if "layers" in name.split(".") else named[config.head]
    return {name: grid for name, grid in found.items() if grid is not None}


def rounds_activations(config: FakeQuantizationConfig) -> bool:
    """Whether inputs of linear layers are rounded too."""
    return isinstance(config, Int8Int4Config | QatConfig)


def scales(weight: Tensor, grid: Grid) -> Tensor:
    """The scale of each group of weight [..., D] -> [..., G], in float32."""
    low, high = grid.bounds
    groups = weight.detach().float().unflatten(-1, (-1, grid.group_size or weight.shape[-1]))
    found = groups.abs().amax(-1) / ((high - low) / 2)
    if grid.group_size is not None:
        found = found.bfloat16().float()
    return found.clamp(min=torch.finfo(torch.bfloat16).smallest_normal)


def round_weight(weight: Tensor, grid: Grid) -> Tensor:
    """Round weight [..., D], keeping its dtype; gradients pass unchanged, except where values were clipped."""
    found, shape = scales(weight, grid), weight.shape
    groups = weight.unflatten(-1, (-1, grid.group_size or shape[-1]))
    return _Rounded.apply(groups, found[..., None], None, *grid.bounds).view(shape)


def round_activations(x: Tensor) -> Tensor:
    """Round x [..., D] to 8 bits per token, keeping its dtype; gradients pass unchanged, except where clipped."""
    wide = x.detach().float()
    low = wide.amin(-1, keepdim=True).clamp(max=0)
    high = wide.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).smallest_normal)
    zero = (-128 - (low / scale).round()).clamp(-128, 127)
    return _Rounded.apply(x, scale, zero, -128, 127)


class _Rounded(torch.autograd.Function):
    """Round to integers in float32, whatever the dtype of `x`, and scale back; straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor | None, low: int, high: int) -> Tensor:
        numbers = (x.float() * (1.0 / scale)).round()
        if zero is not None:
            numbers = numbers + zero
        ctx.save_for_backward((numbers >= low) & (numbers <= high))
        numbers = numbers.clamp(low, high)
        if zero is not None:
            numbers = numbers - zero
        return (numbers * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (inside,) = ctx.saved_tensors
        return grad_outputs[0] * inside, None, None, None, None
