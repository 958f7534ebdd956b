"""Chunked cross-entropy, computed from hidden states without materializing all logits.

The logits of a whole batch are the largest tensor in a small model's training step; here only one chunk of them exists
at a time. For the sum over all positions, loss and gradients come from the same pass: no logits are kept or recomputed
for the backward pass. The loss of each position is the same for the hidden states, whose gradients are scaled by
position in the backward pass; only the head's gradient, if it has one, needs the logits a second time.

N positions, D model width, V rows of the head (padding rows included), C positions in a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretune.objectives.chunks import losses_and_gradients


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, softcap: float | None, chunk_tokens: int
) -> Tensor:
    """Sum of the cross-entropy over the positions whose target is not IGNORE: a float32 scalar, in nats.

    hidden [N, D]; weight [V, D], whose rows from `vocab_size` on are padding and get no probability; targets [N].
    Matrix products use autocast's dtype if it is on; everything else is in float32 (or float64 for float64).
    """
    dtype, needs = compute_dtype(hidden, targets), learning(hidden, weight)
    return _LinearCrossEntropy.apply(hidden, weight, targets, vocab_size, softcap, chunk_tokens, dtype, needs)


def linear_token_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, softcap: float | None, chunk_tokens: int
) -> Tensor:
    """The cross-entropy of each position, 0 where the target is IGNORE: [N] float32, in nats, differentiable.

    Arguments and arithmetic as for `linear_cross_entropy`.
    """
    dtype, needs = compute_dtype(hidden, targets), learning(hidden, weight)
    return _LinearTokenLosses.apply(hidden, weight, targets, vocab_size, softcap, chunk_tokens, dtype, needs)


def learning(hidden: Tensor, weight: Tensor) -> tuple[bool, bool]:
    """Which of the two need a gradient."""
    return (hidden.requires_grad, weight.requires_grad) if torch.is_grad_enabled() else (False, False)


def compute_dtype(hidden: Tensor, targets: Tensor) -> torch.dtype:
    """The dtype of matrix products: autocast's if it is on."""
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
            losses, d_hidden, d_weight = losses_and_gradients(
                hidden.to(dtype), weight.to(dtype), targets, None, vocab_size, softcap, chunk_tokens, needs
            )
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.hidden_dtype, ctx.weight_dtype = hidden.dtype, weight.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return *scaled(ctx, grad_outputs[0]), *(None,) * 6


def scaled(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of hidden states and head that the forward pass has saved, times `scale`, in the dtypes of
    these."""
    d_hidden, d_weight = ctx.saved_tensors
    return (
        None if d_hidden is None else (d_hidden.to(scale.dtype) * scale).to(ctx.hidden_dtype),
        None if d_weight is None else (d_weight * scale).to(ctx.weight_dtype),
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
        needs: tuple[bool, bool],
    ) -> Tensor:
        # Each position's gradient is scaled in the backward pass. A head that learns sums over positions, and so needs
        # the logits a second time; both gradients are computed then.
        at_once = (needs[0] and not needs[1], False)
        with torch.autocast(hidden.device.type, enabled=False):
            losses, d_hidden, _ = losses_and_gradients(
                hidden.to(dtype), weight.to(dtype), targets, None, vocab_size, softcap, chunk_tokens, at_once
            )
        ctx.options = vocab_size, softcap, chunk_tokens, needs
        ctx.head_learns, ctx.dtype, ctx.hidden_dtype = needs[1], dtype, hidden.dtype
        ctx.save_for_backward(*((hidden, weight, targets) if needs[1] else (d_hidden,)))
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (scale,) = grad_outputs
        if not ctx.head_learns:
            (d_hidden,) = ctx.saved_tensors
            return (d_hidden.to(scale.dtype) * scale[:, None]).to(ctx.hidden_dtype), *(None,) * 7
        hidden, weight, targets = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            _, d_hidden, d_weight = losses_and_gradients(
                hidden.to(ctx.dtype), weight.to(ctx.dtype), targets, scale, *ctx.options
            )
        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            None if d_weight is None else d_weight.to(weight.dtype),
            *(None,) * 6,
        )
