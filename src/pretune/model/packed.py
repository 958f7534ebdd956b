"""A copy of a model with its weights packed for fast single-token decoding on a CPU.

Decoding one token means reading every weight once. In the training layout a matrix is read at half the memory bandwidth
or less; in oneDNN's blocked layout, at nearly all of it. The packed weights are a second copy.
"""

from __future__ import annotations

import copy
import platform

import torch
from torch import Tensor, nn

from pretune.model.attention import Attention
from pretune.model.layers import MLP, Norm
from pretune.model.transformer import Transformer

_ROWS = 8
"""Batch size that the layout is optimized for. The layout for 1 row makes 8 rows take twice as long; the one for 8 rows
is just as fast for 1."""


def packed(model: Transformer, dtype: torch.dtype) -> Transformer | None:
    """A copy of `model` that computes the same, up to rounding, with packed linear layers in `dtype` and fewer small
    operations; it shares all other weights with `model`. It has no gradients and is stale once the weights change.

    None where packing gains nothing: on devices other than an x86 CPU, and in dtypes that oneDNN lacks there.
    """
    here = model.head_weight.device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64")
    if not (here and torch.backends.mkldnn.is_available() and _packs(dtype)):
        return None
    # deepcopy treats tensors in its memo as already copied, so that they are shared.
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared)  # type: ignore[arg-type]
    for parent in list(copied.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, Norm) and layer.kind == "rmsnorm" and not layer._forward_hooks:
                setattr(parent, name, PlainNorm(layer))
            # Only plain layers are packed: others also round or dequantize, and an adapter's own layers are left alone.
            if not (isinstance(layer, nn.Linear) and isinstance(parent, Attention | MLP | Transformer)):
                continue
            if type(layer) is nn.Linear and type(layer.weight) is nn.Parameter:
                setattr(parent, name, PackedLinear(layer.weight, layer.bias, dtype))
    if copied.head is None and type(copied.embedding) is nn.Embedding:
        copied.head = PackedLinear(copied.embedding.weight, None, dtype)  # type: ignore[assignment]
    return copied


def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a layout for that dtype on this CPU: bfloat16 needs AVX-512."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PlainNorm(nn.Module):
    """rmsnorm in float32 with as few operations as possible: torch's own uses more of them on a CPU."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        scale = norm.scale()
        self.weight = None if scale is None else scale.detach()
        self.root, self.eps = norm.shape[0] ** 0.5, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        mean = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).div_(self.root).square_().add_(self.eps)
        y = wide * mean.rsqrt_()
        return (y if self.weight is None else y.mul_(self.weight)).to(x.dtype)


class PackedLinear(nn.Module):
    """weight [E, D] in oneDNN's layout; x [..., D] -> [..., E] in `dtype`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), _ROWS)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.packed, self.bias, "none", [], "")
