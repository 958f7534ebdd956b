"""The arithmetic of the chunked cross-entropy: one chunk's logits at a time, in eager and in compiled code.

In a compiled step, the loop over chunks is a single operator whose chunk is compiled for itself. The compiler would not
keep the loop's order: on CUDA it computes the logits of all chunks before it uses the first.

N positions, D model width, V rows of the head (padding rows included), C positions in a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pretune.core.batch import IGNORE

MOST_SHAPES = 64
"""Compiled forms of a chunk that a process may have: first or later, full or last, in training and in evaluation, for
each model of a sweep."""


def losses_and_gradients(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    scale: Tensor | None,
    vocab_size: int,
    softcap: float | None,
    chunk_tokens: int,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss of each position [N], 0 where the target is IGNORE; and the gradients of the losses' sum with respect to
    hidden [N, D] and to head [V, D], each only if `needs` says so.

    `scale` [N] multiplies the gradient of each position. Losses and the head's gradient are in float32 (or float64).
    """
    compiled = torch.compiler.is_compiling()
    run = _operator if compiled else _in_chunks
    losses, d_hidden, d_head = run(hidden, head, targets, scale, vocab_size, softcap, chunk_tokens, *needs, compiled)
    return losses, d_hidden if needs[0] else None, d_head if needs[1] else None


def _in_chunks(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    scale: Tensor | None,
    vocab_size: int,
    softcap: float | None,
    chunk_tokens: int,
    hidden_learns: bool,
    head_learns: bool,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, head = hidden.detach(), head.detach()  # compiled code is guarded by what autograd knows of its arguments
    losses, d_hidden, d_head = _results(hidden, head, hidden_learns, head_learns)
    with _compiled_chunk() if compiled else nullcontext(_chunk) as run:
        for start in range(0, max(len(hidden), 1), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            losses[part], d_rows = run(
                hidden[part],
                head,
                targets[part],
                None if scale is None else scale[part],
                vocab_size,
                softcap,
                hidden_learns,
                d_head if head_learns else None,
                start == 0,
            )
            if d_rows is not None:
                d_hidden[part] = d_rows
    return losses, d_hidden, d_head


def _results(hidden: Tensor, head: Tensor, hidden_learns: bool, head_learns: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the results. A gradient that nobody needs is empty, because an operator cannot return None."""
    wide = _wide(hidden.dtype)
    d_hidden = torch.empty_like(hidden) if hidden_learns else hidden.new_empty(0)
    # The sum over chunks is in float32: a bf16 sum of many chunks would lose small contributions.
    d_head = torch.empty_like(head, dtype=wide) if head_learns else head.new_empty(0, dtype=wide)
    return hidden.new_empty(len(hidden), dtype=wide), d_hidden, d_head


def _chunk(
    rows: Tensor,
    head: Tensor,
    targets: Tensor,
    scale: Tensor | None,
    vocab_size: int,
    softcap: float | None,
    rows_learn: bool,
    d_head: Tensor | None,
    first: bool,
) -> tuple[Tensor, Tensor | None]:
    """Losses [C] of `rows` and, if they learn, their gradient [C, D]. The head's gradient is added to `d_head`, or
    overwrites it for the `first` chunk."""
    logits = rows @ head.T  # [C, V]
    wide, slope = _capped(logits, vocab_size, softcap)
    normalizer = wide.logsumexp(-1, keepdim=True)
    scored, index = targets != IGNORE, targets.clamp(min=0)[:, None]
    losses = torch.where(scored, (normalizer - wide.gather(-1, index))[:, 0], 0)
    if not rows_learn and d_head is None:
        return losses, None
    columns = torch.arange(logits.shape[-1], device=logits.device)
    error = (wide - normalizer).exp() - (columns == index).to(wide.dtype)
    error = error if slope is None else error * slope
    error = error if scale is None else error * scale[:, None]
    d_logits = torch.where(scored[:, None], error, 0).to(logits.dtype)
    if d_head is not None:
        product = d_logits.T @ rows
        d_head.copy_(product) if first else d_head.add_(product)
    return losses, d_logits @ head if rows_learn else None


def _capped(logits: Tensor, vocab_size: int, softcap: float | None) -> tuple[Tensor, Tensor | None]:
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


@contextmanager
def _compiled_chunk() -> Iterator[Callable[..., tuple[Tensor, Tensor | None]]]:
    """The compiled `_chunk`, in a context for calling it."""
    import torch._dynamo

    # The first call of a compiled step runs under a mode that checks operators, with version counting off. If it were
    # on in later calls, the second would compile the chunk again. Nobody needs it, because our results are new.
    versions = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    limit = torch._dynamo.config.patch(recompile_limit=MOST_SHAPES)
    with torch._C._ExcludeDispatchKeyGuard(versions), limit:
        yield _compile_once()


@functools.cache
def _compile_once() -> Callable[..., tuple[Tensor, Tensor | None]]:
    return torch.compile(_chunk, dynamic=False)


_operator = torch.library.custom_op("pretune::chunked_cross_entropy", _in_chunks, mutates_args=())


@_operator.register_fake
def _(hidden: Tensor, head: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, hidden_learns, head_learns, _ = given
    return _results(hidden, head, hidden_learns, head_learns)
