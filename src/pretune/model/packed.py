"""A model laid out for reading a token at a time on a CPU.

What one new token costs is reading every weight once. In the layout in which they are trained, a matrix is read at half
of the memory's speed or less; in oneDNN's own, in blocks, at nearly all of it. It is a second copy of the weights.
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
"""Rows of x that the layout is for. The one for a single row makes 8 rows take twice as long; this one is as good for a
single row."""


def packed(model: Transformer, dtype: torch.dtype) -> Transformer | None:
    """A copy of `model` that computes the same, up to rounding, with packed linear layers in `dtype` and fewer small
    operations; all other weights the two have in common. It is for as long as these stay as they are, and has no
    gradients.

    None where there is nothing to gain: on other devices than an x86 CPU, and in types that oneDNN lacks there.
    """
    here = model.head_weight.device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64")
    if not (here and torch.backends.mkldnn.is_available() and _packs(dtype)):
        return None
    # What deepcopy finds in its memo it takes for copied already.
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared)  # type: ignore[arg-type]
    for parent in list(copied.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, Norm) and layer.kind == "rmsnorm" and not layer._forward_hooks:
                setattr(parent, name, PlainNorm(layer))
            # Others than plain ones do more than multiply: they round, or store their weight in fewer bits; and what an
            # adapter is made of is left to it.
            if not (isinstance(layer, nn.Linear) and isinstance(parent, Attention | MLP | Transformer)):
                continue
            if type(layer) is nn.Linear and type(layer.weight) is nn.Parameter:
                setattr(parent, name, PackedLinear(layer.weight, layer.bias, dtype))
    if copied.head is None and type(copied.embedding) is nn.Embedding:
        copied.head = PackedLinear(copied.embedding.weight, None, dtype)  # type: ignore[assignment]
    return copied


def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a layout for that type on this CPU: for bfloat16 it asks for AVX-512."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PlainNorm(nn.Module):
    """rmsnorm in as few operations as it takes, in float32: torch's own is put together from more of them on a CPU."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.weight = None if norm.weight is None else norm.weight.detach().float()
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
