"""peft's layers with a faster way through them while they are trained.

peft runs an adapter beside its frozen layer: a second pass over every activation, and for LoHa and LoKr a second
product as large as the layer's own, forward and backward. Here the update is added to the weight first, so that one
product serves both, and its factors get their gradients straight from inputs and output gradients, without that of the
whole weight. Parameters, their start, files and merging remain peft's, and so does the pass without gradients.

Where the frozen layer fake-quantizes its weight (it then has `fake_quant_enabled` and `multiply`), the sum of weight
and update is fake-quantized instead: that sum is what merging leaves to be stored.

The frozen layer may store its weight in fewer bits (it then offers `stored` and `expand`). Its weight is put together
in the forward pass, thrown away, and put together again in the backward pass.

N tokens, D inputs, E outputs, R rank. A Kronecker product of [a, c] and [b, d] has E = a b rows and D = c d columns;
r is the rank of its second factor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretune.adapters.quiet_peft import BaseTunerLayer, PeftLoha, PeftLokr, PeftLora

ADAPTER = "default"
"""The only adapter of a model."""

Expand = Callable[[tuple[Tensor, ...], Tensor | None], Tensor]
"""A weight [E, D] from what is stored of it; given a gradient, one that was not kept since the forward pass."""


def use_fast_layers(model: nn.Module) -> None:
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
        if _fake_quantizes(self):
            return _multiply_fake_quantized(self, x)
        # Dropout takes inputs away from the adapter alone: the two cannot share a product then.
        if not _one_product(self) or _drops(self):
            return super().forward(x, *args, **kwargs)
        left, right = _factors(self)
        return low_rank_linear(x, _base(self), left * self.scaling[ADAPTER], right)


class DoraLinear(PeftLora):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _fake_quantizes(self):
            return _multiply_fake_quantized(self, x)
        compressed = _is_compressed(self)
        if _drops(self) or not (_one_product(self) or (compressed and not self.disable_adapters)):
            return super().forward(x, *args, **kwargs)
        left, right = _factors(self)
        update = left @ right
        weight = _weight(self) + self.scaling[ADAPTER] * update  # [E, D]
        # The length of a row is a constant for the gradient, as in the paper's section 4.3.
        length = weight.detach().norm(dim=1)
        direction = self.lora_magnitude_vector[ADAPTER].weight / length
        if compressed:  # the same, with nothing kept that is as large as the weight
            y = low_rank_linear(x, _base(self), left * self.scaling[ADAPTER], right, bias=False) * direction
            return y if _base(self).bias is None else y + _base(self).bias
        return F.linear(x, direction[:, None] * weight, _base(self).bias)


class LohaLinear(PeftLoha):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _fake_quantizes(self):
            return _multiply_fake_quantized(self, x)
        if not _one_product(self):
            return super().forward(x, *args, **kwargs)
        left, right, scale = self.hada_w1_a[ADAPTER], self.hada_w1_b[ADAPTER], _row_scale(self)
        left2, right2 = self.hada_w2_a[ADAPTER], self.hada_w2_b[ADAPTER]
        rank, (rows, columns) = self.r[ADAPTER] ** 2, _base(self).weight.shape
        if 2 * rank * (rows + columns) > rows * columns:
            update = (left @ right) * (left2 @ right2)
            return F.linear(x, _weight(self) + scale * update, _base(self).bias)
        # The elementwise product of two matrices of rank r is one of rank r^2, whose factors are products of theirs.
        left = (left[:, :, None] * left2[:, None, :]).flatten(1)  # [E, r^2]
        right = (right[:, None, :] * right2[None, :, :]).flatten(0, 1)  # [r^2, D]
        return low_rank_linear(x, _base(self), left * scale, right)


class LokrLinear(PeftLokr):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _fake_quantizes(self):
            return _multiply_fake_quantized(self, x)
        if not _one_product(self):
            return super().forward(x, *args, **kwargs)
        small, dropped = self.lokr_w1[ADAPTER] * self.scaling[ADAPTER], self.rank_dropout[ADAPTER] > 0 and self.training
        factors = self._second_factors()
        if factors is not None and not dropped:
            expand, stored = _stored(_base(self))
            return _KroneckerLinear.apply(x, _base(self).bias, small, *factors, _dtype(x), expand, *stored)
        large = self.lokr_w2[ADAPTER] if ADAPTER in self.lokr_w2 else self.lokr_w2_a[ADAPTER] @ self.lokr_w2_b[ADAPTER]
        update = _kronecker(small, large)
        if dropped:
            update = update * _row_scale(self) / self.scaling[ADAPTER]
        return F.linear(x, _weight(self) + update, _base(self).bias)

    def _second_factors(self) -> tuple[Tensor, Tensor] | None:
        """[b, r] and [r, d] whose product is the second matrix; None where it is one of full rank, best used whole."""
        if ADAPTER in self.lokr_w2_a:
            return self.lokr_w2_a[ADAPTER], self.lokr_w2_b[ADAPTER]
        if not _is_compressed(self):
            return None
        whole = self.lokr_w2[ADAPTER]  # small beside the layer's weight, which would be kept if it were used whole
        return whole, torch.eye(whole.shape[1], dtype=whole.dtype, device=whole.device)


def _fake_quantizes(layer: BaseTunerLayer) -> bool:
    """Whether the sum of weight and update is to be rounded, in training and in evaluation."""
    return getattr(_base(layer), "fake_quant_enabled", False) and not layer.disable_adapters and not layer.merged


def _multiply_fake_quantized(layer: Any, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # as it will be merged, in the weight's own precision
        weight = _weight(layer) + layer.get_delta_weight(ADAPTER)
        if isinstance(layer, DoraLinear):
            weight = (layer.lora_magnitude_vector[ADAPTER].weight / weight.detach().norm(dim=1))[:, None] * weight
    return _base(layer).multiply(x, weight)  # pyright: ignore[reportCallIssue]


def low_rank_linear(x: Tensor, base: nn.Linear, left: Tensor, right: Tensor, bias: bool = True) -> Tensor:
    """`base` with left [E, R] @ right [R, D] added to its weight; gradients for x, left and right, none for `base`."""
    expand, stored = _stored(base)
    return _LowRankLinear.apply(x, base.bias if bias else None, left, right, _dtype(x), expand, *stored)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        left: Tensor,
        right: Tensor,
        dtype: torch.dtype,
        expand: Expand | None,
        *stored: Tensor,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            rows, left_, right_ = x.to(dtype), left.to(dtype), right.to(dtype)
            # Added in the weight's own precision and rounded once.
            whole = (_expanded(expand, stored) + left_ @ right_).to(dtype)
            ctx.save_for_backward(rows, left_, right_, *(stored if expand else (whole,)))
            ctx.dtypes, ctx.expand, ctx.num_stored = (x.dtype, left.dtype), expand, len(stored)
            return F.linear(rows, whole, None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        rows, left, right, *kept = ctx.saved_tensors
        x_dtype, dtype = ctx.dtypes
        grad = grad_outputs[0].to(rows.dtype)
        flat, inputs = grad.flatten(0, -2), rows.flatten(0, -2)  # [N, E], [N, D]
        narrow = flat @ left  # [N, R]
        d_left = flat.T @ (inputs @ right.T)
        d_right = narrow.T @ inputs
        if ctx.expand is None:
            d_x = flat @ kept[0]
        else:
            d_x = torch.addmm(flat @ ctx.expand(tuple(kept), grad).to(rows.dtype), narrow, right)
        d_x = d_x.view_as(rows).to(x_dtype)
        return d_x, None, d_left.to(dtype), d_right.to(dtype), None, None, *_nothing(ctx)


class _KroneckerLinear(torch.autograd.Function):
    """A linear layer with kron(small [a, c], left [b, r] @ right [r, d]) added to its weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        small: Tensor,
        left: Tensor,
        right: Tensor,
        dtype: torch.dtype,
        expand: Expand | None,
        *stored: Tensor,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            rows = x.to(dtype)
            whole = (_expanded(expand, stored) + _kronecker(small, left @ right)).to(dtype)
            factors = small.to(dtype), left.to(dtype), right.to(dtype)
            ctx.save_for_backward(rows, *factors, *(stored if expand else (whole,)))
            ctx.dtypes, ctx.expand, ctx.num_stored = (x.dtype, small.dtype), expand, len(stored)
            return F.linear(rows, whole, None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        rows, small, left, right, *kept = ctx.saved_tensors
        x_dtype, dtype = ctx.dtypes
        grad = grad_outputs[0].to(rows.dtype)
        flat = grad.reshape(-1, left.shape[0])  # [N a, b]
        inputs = rows.reshape(-1, right.shape[1])  # [N c, d]
        # What is as wide as an activation is read as it lies; only the narrow [N, r, a] and [N, r, c] are turned.
        outs = (flat @ left).unflatten(0, (-1, small.shape[0])).transpose(1, 2)  # [N, r, a]
        ins = (inputs @ right.T).unflatten(0, (-1, small.shape[1])).transpose(1, 2)  # [N, r, c]
        back = (outs @ small).transpose(1, 2).flatten(0, 1)  # [N c, r]
        d_small = outs.flatten(0, 1).T @ ins.flatten(0, 1)
        d_left = flat.T @ (ins @ small.T).transpose(1, 2).flatten(0, 1)
        d_right = back.T @ inputs
        if ctx.expand is None:
            d_x = grad @ kept[0]
        else:
            d_x = grad @ ctx.expand(tuple(kept), grad).to(rows.dtype) + (back @ right).view_as(rows)
        factors = (d_small.to(dtype), d_left.to(dtype), d_right.to(dtype))
        return d_x.to(x_dtype), None, *factors, None, None, *_nothing(ctx)


def _nothing(ctx: Any) -> list[None]:
    """The gradients of what is stored."""
    return [None] * ctx.num_stored


def _kronecker(small: Tensor, large: Tensor) -> Tensor:
    """[a, c] and [b, d] -> [a b, c d]; one elementwise product, which torch.kron is not to the compiler."""
    rows, columns = small.shape[0] * large.shape[0], small.shape[1] * large.shape[1]
    return (small[:, None, :, None] * large[None, :, None, :]).reshape(rows, columns)


def _base(layer: BaseTunerLayer) -> nn.Linear:
    base = layer.get_base_layer()
    assert isinstance(base, nn.Linear)
    return base


def _stored(base: nn.Linear) -> tuple[Expand | None, tuple[Tensor, ...]]:
    """What a frozen layer stores of its weight, and what makes the weight of it; None where that is the weight."""
    expand: Expand | None = getattr(base, "expand", None)
    return (None, (base.weight,)) if expand is None else (expand, base.stored())  # pyright: ignore


def _expanded(expand: Expand | None, stored: tuple[Tensor, ...]) -> Tensor:
    return stored[0] if expand is None else expand(stored, None)


def _weight(layer: BaseTunerLayer) -> Tensor:
    """The weight of the frozen layer, [E, D]."""
    return _expanded(*_stored(_base(layer)))


def _is_compressed(layer: BaseTunerLayer) -> bool:
    return _stored(_base(layer))[0] is not None


def _factors(layer: PeftLora) -> tuple[Tensor, Tensor]:
    """[E, R] and [R, D]."""
    left, right = layer.lora_B[ADAPTER], layer.lora_A[ADAPTER]
    assert isinstance(left, nn.Linear)
    assert isinstance(right, nn.Linear)
    return left.weight, right.weight


def _one_product(layer: BaseTunerLayer) -> bool:
    """Whether update and weight may be added first: in training, with the adapter at work."""
    # Without gradients, a few tokens at a time, putting the weight together would cost more than it saves.
    return torch.is_grad_enabled() and not layer.disable_adapters and not layer.merged


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
