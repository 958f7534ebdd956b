"""Weights and activations as integers times a scale: how large the scales are, and rounding that gradients pass.

Weights are symmetric: a number is an integer of `bits` bits times the scale of its group. Activations have 8 bits, and
for each token a scale and a zero point that cover all of its values. Scales are torchao's; those of groups are rounded
to bfloat16 besides, as XNNPACK's 4-bit matrices store them, so that a phone multiplies with the very same numbers.

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
    """What a matrix is rounded to: integers of `bits` bits, a scale for each `group_size` neighbours or (None) row."""

    bits: int
    group_size: int | None

    @property
    def bounds(self) -> tuple[int, int]:
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1


def grids(model: nn.Module, config: FakeQuantizationConfig) -> dict[str, Grid]:
    """The linear layers and tables of `model` that are stored as integers, by name, with what they are rounded to.

    Of a layer with an adapter, the layer beneath it.
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
        ):  # which holds an adapter's factors
            found[name] = inside if "layers" in name.split(".") else named[config.head]
    return {name: grid for name, grid in found.items() if grid is not None}


def rounds_activations(config: FakeQuantizationConfig) -> bool:
    """Whether what goes into linear layers is rounded too."""
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
    """weight [..., D] with each number rounded, in its own type; gradients pass where nothing was cut off."""
    found, shape = scales(weight, grid), weight.shape
    groups = weight.unflatten(-1, (-1, grid.group_size or shape[-1]))
    return _Rounded.apply(groups, found[..., None], None, *grid.bounds).view(shape)


def round_activations(x: Tensor) -> Tensor:
    """x [..., D] rounded to 8 bits, a token at a time, in its own type; gradients pass where nothing was cut off."""
    wide = x.detach().float()
    low = wide.amin(-1, keepdim=True).clamp(max=0)
    high = wide.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).smallest_normal)
    zero = (-128 - (low / scale).round()).clamp(-128, 127)
    return _Rounded.apply(x, scale, zero, -128, 127)


class _Rounded(torch.autograd.Function):
    """Rounded as if the result had been an integer, in float32, whatever the type of `x`."""

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
