"""Frozen linear layers in 4 bits: torchao's NF4 tensors, dequantized for each matrix product.

A weight is one of 16 levels times the scale of its block. Scales are themselves 8-bit integers, scaled in blocks.

E outputs, D inputs, N tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretune.core.config import ConfigError
from pretune.core.named_tensors import is_in_block
from pretune.quantization.config import QloraConfig, QuantizationConfig

SCALES = 256
"""Maximum number of scales that share a float factor."""


def quantize(model: nn.Module, config: QuantizationConfig) -> None:
    """Store the frozen linear layers inside the blocks of `model` in 4 bits; do nothing for kind = none.

    Attach adapters before, because they freeze the layers; the adapters themselves are not quantized. Raises
    ConfigError for a layer that cannot be stored in 4 bits.
    """
    if isinstance(config, QloraConfig):
        for name, layer in frozen_layers(model).items():
            _store(name, layer, config.block_size)


def dequantize(model: nn.Module) -> None:
    """Replace 4-bit layers by plain linear layers with the dequantized weights."""
    for layer in model.modules():
        if isinstance(layer, NF4Linear):
            weight = layer.expand(layer.stored(), None)
            layer.__class__ = nn.Linear  # type: ignore[assignment]
            layer.weight = nn.Parameter(weight, requires_grad=False)


def frozen_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside the blocks that are not trained, by name."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: layer for name, layer in layers.items() if is_in_block(name) and not layer.weight.requires_grad}


def stored_bytes(numel: int, block_size: int) -> int:
    """Bytes of a matrix of `numel` weights: 4 bits per weight, 8 bits per block for its scale, a float per block of
    scales, a float for the mean of the scales, and 16 floats for the levels."""
    blocks = numel // block_size
    return numel // 2 + blocks + 4 * (blocks // _scales_together(blocks)) + 4 + 4 * 16


class NF4Linear(nn.Linear):
    """A frozen linear layer whose weight is torchao's NF4Tensor.

    `expand(stored(), after)` is the dequantized weight [E, D]. Passing a tensor `after` makes the result depend on it
    (without changing its values), so that the compiler cannot reuse the weight of the forward pass in the backward pass
    and keep it in memory, but dequantizes it again.
    """

    def forward(self, input: Tensor) -> Tensor:
        return _FrozenLinear.apply(input, self.bias, self.expand, *self.stored())

    def stored(self) -> tuple[Tensor, ...]:
        weight: Any = self.weight
        return (
            weight.quantized_data,
            weight.quantized_scalers,
            weight.quantization_factor,
            weight.scaler_mean,
            weight.nf4,
        )

    def expand(self, stored: tuple[Tensor, ...], after: Tensor | None) -> Tensor:
        pairs, scales, factors, mean, levels = stored
        if after is not None:
            first = after.flatten()[:1]
            scales = scales ^ (first.isnan() & first.isinf()).to(torch.int8)  # always 0: no number is NaN and infinite
        steps = (scales.view(len(factors), -1) / factors[:, None]).flatten() + mean  # [blocks]
        numbers = levels[torch.stack((pairs >> 4, pairs & 15), dim=-1).int()]  # [E D / 2, 2]
        return (numbers.view(len(steps), -1) * steps[:, None]).view(self.out_features, self.in_features)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, expand: Any, *stored: Tensor) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.expand = expand
        return F.linear(x, expand(stored, None), bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad,) = grad_outputs
        weight = ctx.expand(ctx.saved_tensors, grad)
        return grad @ weight.to(grad.dtype), None, None, *(None for _ in ctx.saved_tensors)


def _store(name: str, layer: nn.Linear, block_size: int) -> None:
    numel = layer.weight.numel()
    if numel % block_size:
        raise ConfigError(
            f"quantization=qlora_nf4: {name} has {layer.out_features} x {layer.in_features} weights, not a multiple of "
            f"quantization.block_size={block_size}; set it to a divisor of {numel}, such as {math.gcd(numel, 64)}"
        )
    if layer.weight.is_meta:
        size = stored_bytes(numel, block_size)
        layer.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
        layer.__class__ = _NF4WithoutValues
        return
    from torchao.quantization import NF4Tensor

    weight = layer.weight.detach().contiguous()
    layer.weight = nn.Parameter(
        NF4Tensor.from_tensor(weight, block_size, _scales_together(numel // block_size)), requires_grad=False
    )
    layer.__class__ = NF4Linear
    assert isinstance(layer, NF4Linear)
    if not layer.expand(layer.stored(), None).isfinite().all():
        raise ConfigError(
            f"quantization=qlora_nf4: {name} has weights that are not finite; check the run that produced them"
        )


class _NF4WithoutValues(NF4Linear):
    """Stand-in on the meta device for estimating memory: as many bytes as the real layer, dequantized as often."""

    def stored(self) -> tuple[Tensor, ...]:
        return (self.weight,)

    def expand(self, stored: tuple[Tensor, ...], after: Tensor | None) -> Tensor:
        first = stored[0][:1].float()
        if after is not None:
            first = first + after.flatten()[:1].float()
        return first.expand(self.out_features, self.in_features).contiguous()


def _scales_together(blocks: int) -> int:
    """How many scales share a float: the largest number up to SCALES that divides `blocks`."""
    return max(size for size in range(1, SCALES + 1) if blocks % size == 0)
