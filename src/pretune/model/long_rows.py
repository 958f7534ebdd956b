"""Attention of long rows on a CPU, document by document, with no mask as large as [T, T].

A row of 32,768 tokens would need a mask of 1 GiB, and torch's kernel for CPUs a copy of it in the queries' dtype, in
every layer. Here each document is attended to alone, which a causal kernel does without a mask. If there is a window
that is shorter than the document, blocks of queries attend to the keys that their windows reach.

B rows, T tokens, H query heads, G key-value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

LONG = 1024
"""Rows of this many tokens or more are attended to in parts, which is faster and takes less memory. Shorter ones gain
little, or lose by the number of calls."""

BLOCK = 512
"""Queries that attend at once where a document is longer than the window."""


class Parts(NamedTuple):
    """Which tokens attend to which, instead of a mask: those of one document, to the newest `window` up to their own.

    document_ids [B, T], those of a document one after the other; window: None for all earlier tokens of the document.
    """

    document_ids: Tensor
    window: int | None


def attends_in_parts(tokens: Tensor, dropout: float, softcap: float | None) -> bool:
    """Whether rows like tokens [B, T] are attended to in parts: long ones on a CPU, whose kernel has no dropout and no
    softcaps."""
    return tokens.device.type == "cpu" and tokens.shape[1] >= LONG and not dropout and softcap is None


def attend_in_parts(q: Tensor, k: Tensor, v: Tensor, parts: Parts, scale: float) -> Tensor:
    """Attend from queries [B, H, T, K] to keys and values [B, G, T, K] -> [B, H, T, K]."""
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (heads.to(torch.get_autocast_dtype("cpu")) for heads in (q, k, v))
    return torch.ops.pretune.attention_in_parts(q, k, v, parts.document_ids, parts.window, scale)[0]


def _attention(
    q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs [B, H, T, K], and the log-sum-exp [B, H, T] of the logits, which the gradient needs."""
    y, normalizer = _results(q)
    for row, queries, keys in _parts(document_ids, window):
        mask = _mask(queries, keys, window, q.dtype)
        mine = q[row, :, queries], k[row, :, keys], v[row, :, keys]
        y[row, :, queries], normalizer[row, :, queries] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *mine, 0.0, mask is None, attn_mask=mask, scale=scale
        )
    return y, normalizer


def _gradients(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    normalizer: Tensor,
    document_ids: Tensor,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    found = _heads_like(q), _heads_like(k).zero_(), _heads_like(v).zero_()
    for row, queries, keys in _parts(document_ids, window):
        mask = _mask(queries, keys, window, q.dtype)
        mine = q[row, :, queries], k[row, :, keys], v[row, :, keys]
        theirs = y[row, :, queries], normalizer[row, :, queries]
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dy[row, :, queries], *mine, *theirs, 0.0, mask is None, attn_mask=mask, scale=scale
        )
        found[0][row, :, queries] = dq
        found[1][row, :, keys] += dk  # windows of neighbouring blocks overlap
        found[2][row, :, keys] += dv
    return found


def _parts(document_ids: Tensor, window: int | None) -> Iterator[tuple[slice, slice, slice]]:
    """The row, the queries and the keys of each part; every query is in one."""
    for row, ids in enumerate(document_ids):
        ends = ids.unique_consecutive(return_counts=True)[1].cumsum(0).tolist()
        for start, end in zip([0, *ends], ends, strict=False):
            if window is None or end - start <= window:
                yield slice(row, row + 1), slice(start, end), slice(start, end)
                continue
            for first in range(start, end, BLOCK):
                last = min(first + BLOCK, end)
                yield slice(row, row + 1), slice(first, last), slice(max(start, first - window + 1), last)


def _mask(queries: slice, keys: slice, window: int | None, dtype: torch.dtype) -> Tensor | None:
    """The additive mask of a block within a longer document; None for a whole document, which is causal."""
    if window is None or (queries == keys and queries.stop - queries.start <= window):
        return None
    behind = torch.arange(queries.start, queries.stop)[:, None] - torch.arange(keys.start, keys.stop)
    return torch.zeros(behind.shape, dtype=dtype).masked_fill_((behind < 0) | (behind >= window), -torch.inf)


def _heads_like(heads: Tensor) -> Tensor:
    """Memory of the same shape [B, H, T, K], in which a token's heads lie together, as the layers around have it."""
    return heads.new_empty(heads.transpose(1, 2).shape).transpose(1, 2)


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    return _heads_like(q), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, document_ids, ctx.window, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, document_ids)


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.pretune.attention_in_parts_backward(dy, *ctx.saved_tensors, ctx.window, ctx.scale)
    return (*found, None, None, None)


# Operators of their own, because where a document ends is known only when they run. Compiled code just calls them.
_operator = torch.library.custom_op("pretune::attention_in_parts", _attention, mutates_args=())
_operator.register_autograd(_backward, setup_context=_keep)
_operator_backward = torch.library.custom_op("pretune::attention_in_parts_backward", _gradients, mutates_args=())


@_operator.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _results(q)


@_operator_backward.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _heads_like(q), _heads_like(k), _heads_like(v)


# What they compute at most, in one document: else the compiler takes them for free, and repeats them to save memory.
@register_flop_formula(torch.ops.pretune.attention_in_parts)
def _(q_shape: Any, *_: Any, **__: Any) -> int:
    rows, heads, length, width = q_shape
    return 2 * rows * heads * length * length * width


@register_flop_formula(torch.ops.pretune.attention_in_parts_backward)
def _(dy_shape: Any, *_: Any, **__: Any) -> int:
    rows, heads, length, width = dy_shape
    return 5 * rows * heads * length * length * width
