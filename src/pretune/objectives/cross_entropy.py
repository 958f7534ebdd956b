"""Chunked cross-entropy, computed from hidden states without materializing all logits.

The logits of a whole batch are the largest tensor in a small model's training step; here only one chunk of them exists
at a time. For the sum over all positions, loss and gradients come from the same pass: no logits are kept or recomputed
for the backward pass. For the loss of each position, the backward pass recomputes the logits, because the incoming
gradient of each position is not known earlier.

N positions, D model width, V rows of the head (padding rows included), C positions in a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretune.core.batch import IGNORE


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, softcap: float | None, chunk_tokens: int
) -> Tensor:
    """Sum of the cross-entropy over the positions whose target is not IGNORE: a float32 scalar, in nats.

    hidden [N, D]; weight [V, D], whose rows from `vocab_size` on are padding and get no probability; targets [N].
    Matrix products use autocast's dtype if it is on; everything else is in float32 (or float64 for float64).
    """
    needs = (hidden.requires_grad, weight.requires_grad) if torch.is_grad_enabled() else (False, False)
    dtype = _compute_dtype(hidden, targets)
    return _LinearCrossEntropy.apply(hidden, weight, targets, vocab_size, softcap, chunk_tokens, dtype, needs)


def linear_token_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, softcap: float | None, chunk_tokens: int
) -> Tensor:
    """The cross-entropy of each position, 0 where the target is IGNORE: [N] float32, in nats, differentiable.

    Arguments and arithmetic as for `linear_cross_entropy`.
    """
    dtype = _compute_dtype(hidden, targets)
    return _LinearTokenLosses.apply(hidden, weight, targets, vocab_size, softcap, chunk_tokens, dtype)


def _compute_dtype(hidden: Tensor, targets: Tensor) -> torch.dtype:
    assert hidden.shape[:-1] == targets.shape, (hidden.shape, targets.shape)
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        softcap: float | None,
        chunk_tokens: int,
        dtype: torch.dtype,
        needs: tuple[bool, bool],
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)
            loss = torch.zeros((), dtype=_wide(dtype), device=hidden.device)
            d_hidden: list[Tensor] = []
            # Sum over chunks in float32: a bf16 sum of many chunks would lose small contributions.
            d_weight = torch.zeros(weight.shape, dtype=_wide(dtype), device=weight.device) if needs[1] else None
            for rows, target in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
                rows = rows.to(dtype)
                chunk_loss, d_logits = _chunk(rows @ matrix.T, target, vocab_size, softcap)
                loss = loss + chunk_loss
                if needs[0]:
                    d_hidden.append(d_logits @ matrix)
                if d_weight is not None:
                    d_weight += d_logits.T @ rows
        ctx.save_for_backward(torch.cat(d_hidden) if needs[0] else None, d_weight)
        ctx.hidden_dtype, ctx.weight_dtype = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (scale,) = grad_outputs
        d_hidden, d_weight = ctx.saved_tensors
        return (
            None if d_hidden is None else (d_hidden.to(scale.dtype) * scale).to(ctx.hidden_dtype),
            None if d_weight is None else (d_weight * scale).to(ctx.weight_dtype),
            *(None,) * 6,
        )


class _LinearTokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        softcap: float | None,
        chunk_tokens: int,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.options = vocab_size, softcap, chunk_tokens, dtype
        losses = []
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)
            for rows, target in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
                wide, _ = capped_logits(rows.to(dtype) @ matrix.T, vocab_size, softcap)
                losses.append(_losses(wide, target, wide.logsumexp(-1, keepdim=True)))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        hidden, weight, targets = ctx.saved_tensors
        vocab_size, softcap, chunk_tokens, dtype = ctx.options
        d_hidden: list[Tensor] = []
        d_weight = torch.zeros(weight.shape, dtype=_wide(dtype), device=weight.device)
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)
            parts = zip(*(one.split(chunk_tokens) for one in (hidden, targets, grad_outputs[0])), strict=True)
            for rows, target, scale in parts:
                rows = rows.to(dtype)
                _, d_logits = _chunk(rows @ matrix.T, target, vocab_size, softcap, scale)
                if ctx.needs_input_grad[0]:
                    d_hidden.append(d_logits @ matrix)
                if ctx.needs_input_grad[1]:
                    d_weight += d_logits.T @ rows
        return (
            torch.cat(d_hidden).to(hidden.dtype) if ctx.needs_input_grad[0] else None,
            d_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            *(None,) * 5,
        )


def _chunk(
    logits: Tensor, targets: Tensor, vocab_size: int, softcap: float | None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss of a chunk, and the gradient [C, V] of its raw logits [C, V], in their dtype; `scale` [C] multiplies the
    gradient of each position."""
    wide, slope = capped_logits(logits, vocab_size, softcap)
    normalizer = wide.logsumexp(-1, keepdim=True)
    columns = torch.arange(logits.shape[-1], device=logits.device)
    error = (wide - normalizer).exp() - (columns == targets.clamp(min=0)[:, None]).to(wide.dtype)
    error = error if slope is None else error * slope
    error = error if scale is None else error * scale[:, None]
    gradient = torch.where((targets != IGNORE)[:, None], error, 0).to(logits.dtype)
    return _losses(wide, targets, normalizer).sum(), gradient


def _losses(wide: Tensor, targets: Tensor, normalizer: Tensor) -> Tensor:
    """Cross-entropy [C] from logits [C, V] and their logsumexp [C, 1]."""
    losses = normalizer - wide.gather(-1, targets.clamp(min=0)[:, None])
    return torch.where(targets != IGNORE, losses[:, 0], 0)


def capped_logits(logits: Tensor, vocab_size: int, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """float32 logits after softcap, with padding at -inf; and the derivative of the softcap, or None without one."""
    wide, slope = logits.to(_wide(logits.dtype)), None
    if softcap is not None:
        bent = torch.tanh(wide / softcap)
        wide, slope = softcap * bent, 1 - bent.square()
    if vocab_size < logits.shape[-1]:
        wide = wide.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= vocab_size, -torch.inf)
    return wide, slope


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
