"""peft's adapter layers with a faster forward and backward pass for training.

peft runs an adapter beside its frozen layer: a second pass over every activation, and for LoHa and LoKr a second matrix
product as large as the layer's own, forward and backward. Here the update is added to the weight first, so that one
product serves both, and the factors' gradients are computed directly from inputs and output gradients, without forming
the gradient of the whole weight. Parameters, initialization, files and merging remain peft's, as does the forward pass
without gradients.

If the frozen layer fake-quantizes its weight (it then has `fake_quant_enabled` and `multiply`), the sum of weight and
update is fake-quantized instead, because that sum is what is stored after merging.

The frozen layer may store its weight in fewer bits (it then has `stored` and `expand`). The weight is then dequantized
in the forward pass, discarded, and dequantized again in the backward pass.

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
"""peft's name for a model's only adapter."""

Expand = Callable[[tuple[Tensor, ...], Tensor | None], Tensor]
"""Dequantizes a weight [E, D] from its stored tensors. The second argument is a gradient in the backward pass:
depending on it keeps the compiler from reusing the weight of the forward pass."""


def use_fast_layers(model: nn.Module) -> None:
    """Replace the class of peft's layers in `model` by the faster ones."""
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
        # Dropout applies to the adapter's inputs only, so adapter and frozen layer cannot share a product.
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
        # Row norms are treated as constants in the backward pass, as in section 4.3 of the paper.
        length = weight.detach().norm(dim=1)
        direction = self.lora_magnitude_vector[ADAPTER].weight / length
        if compressed:  # the same, without saving a tensor as large as the weight
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
        # The elementwise product of two matrices of rank r has rank r^2; its factors are products of their factors.
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
        """[b, r] and [r, d] whose product is the second matrix; None if it has full rank and is best used whole."""
        if ADAPTER in self.lokr_w2_a:
            return self.lokr_w2_a[ADAPTER], self.lokr_w2_b[ADAPTER]
        if not _is_compressed(self):
            return None
        # A trivial factorization: using the matrix whole would save the layer's dequantized weight for the backward
        # pass.
        whole = self.lokr_w2[ADAPTER]
        return whole, torch.eye(whole.shape[1], dtype=whole.dtype, device=whole.device)


def _fake_quantizes(layer: BaseTunerLayer) -> bool:
    """Whether the sum of weight and update is fake-quantized, in training and in evaluation."""
    return getattr(_base(layer), "fake_quant_enabled", False) and not layer.disable_adapters and not layer.merged


def _multiply_fake_quantized(layer: Any, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # in the weight's own precision, as when merging
        weight = _weight(layer) + layer.get_delta_weight(ADAPTER)
        if isinstance(layer, DoraLinear):
            weight = (layer.lora_magnitude_vector[ADAPTER].weight / weight.detach().norm(dim=1))[:, None] * weight
    return _base(layer).multiply(x, weight)  # pyright: ignore[reportCallIssue]


def low_rank_linear(x: Tensor, base: nn.Linear, left: Tensor, right: Tensor, bias: bool = True) -> Tensor:
    """Apply `base` with left [E, R] @ right [R, D] added to its weight; gradients for x, left and right, not `base`."""
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
            # Added in the weight's own precision, so that the sum is rounded only once.
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
    """A linear layer with kron(small [a, c], left [b, r] @ right [r, d]) added to its weight.

    With x as [N, c, d] and the output as [N, a, b], the product with the Kronecker matrix is a sum of small[a, c]
    left[b, r] right[r, d] x[c, d] over c, r and d. The backward pass therefore contracts one factor at a time, and
    never forms the gradient [E, D] of the weight.
    """

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
        # Only the narrow tensors [N, r, a] and [N, r, c] are transposed; those as large as an activation are not.
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
    """Gradients of the stored tensors: none."""
    return [None] * ctx.num_stored


def _kronecker(small: Tensor, large: Tensor) -> Tensor:
    """Kronecker product of [a, c] and [b, d] -> [a b, c d], as an elementwise product that the compiler can fuse (it
    cannot fuse torch.kron)."""
    rows, columns = small.shape[0] * large.shape[0], small.shape[1] * large.shape[1]
    return (small[:, None, :, None] * large[None, :, None, :]).reshape(rows, columns)


def _base(layer: BaseTunerLayer) -> nn.Linear:
    base = layer.get_base_layer()
    assert isinstance(base, nn.Linear)
    return base


def _stored(base: nn.Linear) -> tuple[Expand | None, tuple[Tensor, ...]]:
    """The function that dequantizes a frozen layer's weight (None if it is not quantized), and its stored tensors."""
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
    """LoRA's factors B [E, R] and A [R, D]."""
    left, right = layer.lora_B[ADAPTER], layer.lora_A[ADAPTER]
    assert isinstance(left, nn.Linear)
    assert isinstance(right, nn.Linear)
    return left.weight, right.weight


def _one_product(layer: BaseTunerLayer) -> bool:
    """Whether to add the update to the weight first: only with gradients or compiled, and with the adapter enabled."""
    # When decoding a few tokens at a time, forming the sum would cost more than it saves. What is compiled is a batch
    # to evaluate, or has its weights built in; and peft's DoRA would be compiled in many pieces.
    many = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return many and not layer.disable_adapters and not layer.merged


def _drops(layer: PeftLora) -> bool:
    return layer.training and isinstance(layer.lora_dropout[ADAPTER], nn.Dropout)


def _row_scale(layer: PeftLoha | PeftLokr) -> Tensor | float:
    """Scale of the update; per row if rows are dropped, with the remaining ones scaled up to keep the mean."""
    scale, dropout = layer.scaling[ADAPTER], layer.rank_dropout[ADAPTER]
    if not (layer.training and dropout):
        return scale
    weight = _base(layer).weight
    return F.dropout(torch.full((weight.shape[0], 1), scale, device=weight.device), dropout)


def _dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
