"""peft's layers with a faster way through them while they are trained.

peft runs an adapter beside its frozen layer: a second pass over every activation, and for LoHa and LoKr a second
product as large as the layer's own, forward and backward. Here the update is added to the weight first, so that one
product serves both, and its factors get their gradients straight from inputs and output gradients, without that of the
whole weight. Parameters, their start, files and merging remain peft's, and so does the pass without gradients.

N tokens, D inputs, E outputs, R rank. A Kronecker product of [a, c] and [b, d] has E = a b rows and D = c d columns;
r is the rank of its second factor.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.loha.layer import Linear as PeftLoha
from peft.tuners.lokr.layer import Linear as PeftLokr
from peft.tuners.lora.layer import Linear as PeftLora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

ADAPTER = "default"
"""The only adapter of a model."""


def quicken(model: nn.Module) -> None:
    """Let peft's layers in `model` take the faster way."""
    for module in model.modules():
        if type(module) is PeftLora:
            module.__class__ = DoraLinear if module.lora_variant else LoraLinear
        elif type(module) is PeftLoha:
            module.__class__ = LohaLinear
        elif type(module) is PeftLokr:
            module.__class__ = LokrLinear


class LoraLinear(PeftLora):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Dropout takes inputs away from the adapter alone: the two cannot share a product then.
        if not _one_product(self) or _drops(self):
            return super().forward(x, *args, **kwargs)
        left, right = _factors(self)
        return low_rank_linear(x, _base(self), left * self.scaling[ADAPTER], right)


class DoraLinear(PeftLora):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not _one_product(self) or _drops(self):
            return super().forward(x, *args, **kwargs)
        left, right = _factors(self)
        update = left @ right
        weight = _base(self).weight + self.scaling[ADAPTER] * update  # [E, D]
        # The length of a row is a constant for the gradient, as in the paper's section 4.3.
        length = weight.detach().norm(dim=1)
        direction = self.lora_magnitude_vector[ADAPTER].weight / length
        return F.linear(x, direction[:, None] * weight, _base(self).bias)


class LohaLinear(PeftLoha):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not _one_product(self):
            return super().forward(x, *args, **kwargs)
        left, right, scale = self.hada_w1_a[ADAPTER], self.hada_w1_b[ADAPTER], _row_scale(self)
        left2, right2 = self.hada_w2_a[ADAPTER], self.hada_w2_b[ADAPTER]
        rank, (rows, columns) = self.r[ADAPTER] ** 2, _base(self).weight.shape
        if 2 * rank * (rows + columns) > rows * columns:
            update = (left @ right) * (left2 @ right2)
            return F.linear(x, _base(self).weight + scale * update, _base(self).bias)
        # The elementwise product of two matrices of rank r is one of rank r^2, whose factors are products of theirs.
        left = (left[:, :, None] * left2[:, None, :]).flatten(1)  # [E, r^2]
        right = (right[:, None, :] * right2[None, :, :]).flatten(0, 1)  # [r^2, D]
        return low_rank_linear(x, _base(self), left * scale, right)


class LokrLinear(PeftLokr):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not _one_product(self):
            return super().forward(x, *args, **kwargs)
        small, dropped = self.lokr_w1[ADAPTER] * self.scaling[ADAPTER], self.rank_dropout[ADAPTER] > 0 and self.training
        if ADAPTER in self.lokr_w2_a and not dropped:
            return _KroneckerLinear.apply(
                x,
                _base(self).weight,
                _base(self).bias,
                small,
                self.lokr_w2_a[ADAPTER],
                self.lokr_w2_b[ADAPTER],
                _dtype(x),
            )
        large = self.lokr_w2[ADAPTER] if ADAPTER in self.lokr_w2 else self.lokr_w2_a[ADAPTER] @ self.lokr_w2_b[ADAPTER]
        update = _kronecker(small, large)
        if dropped:
            update = update * _row_scale(self) / self.scaling[ADAPTER]
        return F.linear(x, _base(self).weight + update, _base(self).bias)


def low_rank_linear(x: Tensor, base: nn.Linear, left: Tensor, right: Tensor) -> Tensor:
    """`base` with left [E, R] @ right [R, D] added to its weight; gradients for x, left and right, none for `base`."""
    return _LowRankLinear.apply(x, base.weight, base.bias, left, right, _dtype(x))


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            rows, left_, right_ = x.to(dtype), left.to(dtype), right.to(dtype)
            # Added in the weight's own precision and rounded once.
            whole = (weight + left_ @ right_).to(dtype)
            ctx.save_for_backward(rows, whole, left_, right_)
            ctx.dtypes = x.dtype, left.dtype
            return F.linear(rows, whole, None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        rows, whole, left, right = ctx.saved_tensors
        x_dtype, dtype = ctx.dtypes
        grad = grad_outputs[0].to(whole.dtype)
        flat, inputs = grad.flatten(0, -2), rows.flatten(0, -2)  # [N, E], [N, D]
        d_left = flat.T @ (inputs @ right.T)
        d_right = (flat @ left).T @ inputs
        return (grad @ whole).to(x_dtype), None, None, d_left.to(dtype), d_right.to(dtype), None


class _KroneckerLinear(torch.autograd.Function):
    """A linear layer with kron(small [a, c], left [b, r] @ right [r, d]) added to its weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        small: Tensor,
        left: Tensor,
        right: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            rows = x.to(dtype)
            whole = (weight + _kronecker(small, left @ right)).to(dtype)
            ctx.save_for_backward(rows, whole, small.to(dtype), left.to(dtype), right.to(dtype))
            ctx.dtypes = x.dtype, small.dtype
            return F.linear(rows, whole, None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        rows, whole, small, left, right = ctx.saved_tensors
        x_dtype, dtype = ctx.dtypes
        grad = grad_outputs[0].to(whole.dtype)
        flat = grad.reshape(-1, left.shape[0])  # [N a, b]
        inputs = rows.reshape(-1, right.shape[1])  # [N c, d]
        # What is as wide as an activation is read as it lies; only the narrow [N, r, a] and [N, r, c] are turned.
        outs = (flat @ left).unflatten(0, (-1, small.shape[0])).transpose(1, 2)  # [N, r, a]
        ins = (inputs @ right.T).unflatten(0, (-1, small.shape[1])).transpose(1, 2)  # [N, r, c]
        d_small = outs.flatten(0, 1).T @ ins.flatten(0, 1)
        d_left = flat.T @ (ins @ small.T).transpose(1, 2).flatten(0, 1)
        d_right = (outs @ small).transpose(1, 2).flatten(0, 1).T @ inputs
        factors = (d_small.to(dtype), d_left.to(dtype), d_right.to(dtype))
        return (grad @ whole).to(x_dtype), None, None, *factors, None


def _kronecker(small: Tensor, large: Tensor) -> Tensor:
    """[a, c] and [b, d] -> [a b, c d]; one elementwise product, which torch.kron is not to the compiler."""
    rows, columns = small.shape[0] * large.shape[0], small.shape[1] * large.shape[1]
    return (small[:, None, :, None] * large[None, :, None, :]).reshape(rows, columns)


def _base(layer: BaseTunerLayer) -> nn.Linear:
    base = layer.get_base_layer()
    assert isinstance(base, nn.Linear)
    return base


def _factors(layer: PeftLora) -> tuple[Tensor, Tensor]:
    """[E, R] and [R, D]."""
    left, right = layer.lora_B[ADAPTER], layer.lora_A[ADAPTER]
    assert isinstance(left, nn.Linear)
    assert isinstance(right, nn.Linear)
    return left.weight, right.weight


def _one_product(layer: BaseTunerLayer) -> bool:
    """Whether update and weight may be added first: in training, of a plain weight with its adapter at work."""
    # Without gradients, a few tokens at a time, putting the weight together would cost more than it saves.
    plain = type(_base(layer).weight) is nn.Parameter
    return torch.is_grad_enabled() and plain and not layer.disable_adapters and not layer.merged


def _drops(layer: PeftLora) -> bool:
    return layer.training and isinstance(layer.lora_dropout[ADAPTER], nn.Dropout)


def _row_scale(layer: PeftLoha | PeftLokr) -> Tensor | float:
    """Factor of the update, per row where rows are dropped: those that stay make up for the others, on average."""
    scale, dropout = layer.scaling[ADAPTER], layer.rank_dropout[ADAPTER]
    if not (layer.training and dropout):
        return scale
    weight = _base(layer).weight
    return F.dropout(torch.full((weight.shape[0], 1), scale, device=weight.device), dropout)


def _dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
