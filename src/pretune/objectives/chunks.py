"""Losses of logits, one chunk of positions at a time, in eager and in compiled code; and the one of cross-entropy.

In a compiled step, the loop over chunks is a single operator whose chunk is compiled for itself. The compiler would not
keep the loop's order: on CUDA it computes the logits of all chunks before it uses the first.

N positions, D model width, V rows of the head (padding rows included), C positions in a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pretune.core.batch import IGNORE

Chunk = Callable[..., tuple[Tensor, Tensor | None]]
"""Computes a chunk, see `_chunk` and `run_chunks`: losses [C, ...] of rows [C, D], and their gradient [C, D] if they
learn."""

Found = tuple[Tensor, Tensor, Tensor]
"""What a loop over chunks fills in, see `results`."""

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
    given = hidden, head, targets, scale, vocab_size, softcap, chunk_tokens
    return run_operator(_operator, _in_chunks, given, needs)


def run_operator(
    operator: Callable[..., Found], eager: Callable[..., Found], given: Sequence[Any], needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What `eager`, or in compiled code `operator`, computes of `given`: see `results`, with None for a gradient that
    nobody needs."""
    compiled = torch.compiler.is_compiling()
    losses, d_hidden, d_head = (operator if compiled else eager)(*given, *needs, compiled)
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
) -> Found:
    needs = hidden_learns, head_learns
    found = results(hidden, head, needs)
    run_chunks(_chunk, hidden, head, (targets, scale), (vocab_size, softcap), found, chunk_tokens, needs, compiled)
    return found


def run_chunks(
    chunk: Chunk,
    hidden: Tensor,
    head: Tensor,
    along: Sequence[Tensor | None],
    constants: Sequence[Any],
    found: Found,
    chunk_tokens: int,
    needs: tuple[bool, bool],
    compiled: bool,
) -> None:
    """Fill in `found` (see `results`) with what `chunk` computes of each `chunk_tokens` positions.

    `along`: tensors [N, ...], of which each chunk gets its positions; `constants`: what every chunk gets, after these.
    """
    hidden, head = hidden.detach(), head.detach()  # compiled code is guarded by what autograd knows of its arguments
    losses, d_hidden, d_head = found
    with _compiled(chunk) if compiled else nullcontext(chunk) as run:
        for start in range(0, max(len(hidden), 1), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            own = (None if one is None else one[part] for one in along)
            learning = needs[0], d_head if needs[1] else None, start == 0
            losses[part], d_rows = run(hidden[part], head, *own, *constants, *learning)
            if d_rows is not None:
                d_hidden[part] = d_rows


def results(hidden: Tensor, head: Tensor, needs: tuple[bool, bool], kinds: Sequence[int] = ()) -> Found:
    """Memory for the losses [N, *kinds] and the gradients of hidden [N, D] and head [V, D]. A gradient that nobody
    needs is empty, because an operator cannot return None."""
    wide = _wide(hidden.dtype)
    d_hidden = torch.empty_like(hidden) if needs[0] else hidden.new_empty(0)
    # The sum over chunks is in float32: a bf16 sum of many chunks would lose small contributions.
    d_head = torch.empty_like(head, dtype=wide) if needs[1] else head.new_empty(0, dtype=wide)
    return hidden.new_empty(len(hidden), *kinds, dtype=wide), d_hidden, d_head


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
    """Losses [C] of `rows` and, if they learn, their gradient [C, D]; `d_head`, `first`: see `back`."""
    wide, slope = capped(rows @ head.T, vocab_size, softcap)  # [C, V]
    losses, normalizer = cross_entropy(wide, targets)
    if not rows_learn and d_head is None:
        return losses, None
    error = cross_entropy_error(wide, normalizer, targets)
    error = error if slope is None else error * slope
    error = error if scale is None else error * scale[:, None]
    return losses, back(error, targets, rows, head, rows_learn, d_head, first)


def cross_entropy(wide: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [C] of logits [C, V], 0 where the target is IGNORE, and the log-sum-exp [C, 1] of the logits."""
    normalizer = wide.logsumexp(-1, keepdim=True)
    scored, index = targets != IGNORE, targets.clamp(min=0)[:, None]
    return torch.where(scored, (normalizer - wide.gather(-1, index))[:, 0], 0), normalizer


def cross_entropy_error(wide: Tensor, normalizer: Tensor, targets: Tensor) -> Tensor:
    """The gradient [C, V] of these losses with respect to the logits; undefined where the target is IGNORE."""
    columns = torch.arange(wide.shape[-1], device=wide.device)
    return (wide - normalizer).exp() - (columns == targets.clamp(min=0)[:, None]).to(wide.dtype)


def back(
    error: Tensor,
    targets: Tensor,
    rows: Tensor,
    head: Tensor,
    rows_learn: bool,
    d_head: Tensor | None,
    first: bool,
) -> Tensor | None:
    """The gradient [C, D] of rows, if they learn, from `error`, that of their logits [C, V], where it is scored. The
    head's gradient is added to `d_head`, or overwrites it for the `first` chunk."""
    d_logits = torch.where((targets != IGNORE)[:, None], error, 0).to(rows.dtype)
    if d_head is not None:
        product = d_logits.T @ rows
        d_head.copy_(product) if first else d_head.add_(product)
    return d_logits @ head if rows_learn else None


def capped(logits: Tensor, vocab_size: int, softcap: float | None) -> tuple[Tensor, Tensor | None]:
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
def _compiled(chunk: Chunk) -> Iterator[Chunk]:
    """The compiled `chunk`, in a context for calling it."""
    import torch._dynamo

    # The first call of a compiled step runs under a mode that checks operators, with version counting off. If it were
    # on in later calls, the second would compile the chunk again. Nobody needs it, because our results are new.
    versions = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    limit = torch._dynamo.config.patch(recompile_limit=MOST_SHAPES)
    with torch._C._ExcludeDispatchKeyGuard(versions), limit:
        yield _compile_once(chunk)


@functools.cache
def _compile_once(chunk: Chunk) -> Chunk:
    return torch.compile(chunk, dynamic=False)


_operator = torch.library.custom_op("pretune::chunked_cross_entropy", _in_chunks, mutates_args=())


@_operator.register_fake
def _(hidden: Tensor, head: Tensor, *given: Any) -> Found:
    *_, hidden_learns, head_learns, _ = given
    return results(hidden, head, (hidden_learns, head_learns))
