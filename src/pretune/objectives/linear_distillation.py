"""Cross-entropy and divergence from a teacher, computed from hidden states of both without materializing all logits.

As in the chunked cross-entropy, loss and gradients come from the same pass, and only one chunk's logits exist at a
time: those of the model and, unless the teacher's distribution is given, those of the teacher.

N positions, D model width, V rows of the head (padding rows included), E and U the same of the teacher, C positions in
a chunk, K tokens that are kept of the teacher's distribution, M tokens that both vocabularies have.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretune.core.batch import IGNORE
from pretune.objectives.chunks import (
    back,
    capped,
    cross_entropy,
    cross_entropy_error,
    results,
    run_chunks,
    run_operator,
)
from pretune.objectives.cross_entropy import compute_dtype, learning, scaled
from pretune.objectives.divergence import divergence, lumped, soft_distribution, spread


class Teacher(NamedTuple):
    """What the teacher says of N positions. `tokens` [N, K] and `rows` [N, K + 1]: log-probabilities at the temperature
    of its likeliest tokens, and of all others together; or its whole distribution: `rows` [N, E], hidden states, and
    `head` [U, E] in the same dtype, with `softcap`.

    common: M, the number of tokens compared, the first of both vocabularies.
    """

    rows: Tensor
    tokens: Tensor | None
    head: Tensor | None
    softcap: float | None
    common: int


class Mix(NamedTuple):
    """How the loss is put together: (1 - alpha) cross-entropy + alpha temperature^2 divergence. With the square,
    gradients are as large at any temperature (arXiv 1503.02531, section 2)."""

    alpha: float
    temperature: float
    divergence: str
    beta: float


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    softcap: float | None,
    teacher: Teacher,
    mix: Mix,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the positions whose target is not IGNORE, float32 scalars in nats: the loss, which is differentiable;
    its cross-entropy; and its divergence, without the factor temperature^2.

    Arguments and arithmetic as for `linear_cross_entropy`.
    """
    dtype, needs = compute_dtype(hidden, targets), learning(hidden, weight)
    of_teacher = teacher.rows, teacher.tokens, teacher.head
    options = vocab_size, softcap, teacher.softcap, teacher.common, *mix, chunk_tokens
    loss, parts = _LinearDistillation.apply(hidden, weight, targets, *of_teacher, options, mix, dtype, needs)
    return loss, *parts.unbind()


def divergence_from(logits: Tensor, teacher: Teacher, mix: Mix) -> Tensor:
    """The divergence [C] of a model's logits [C, V] from a teacher's distributions over C positions."""
    return _divergence(logits.float(), teacher, mix)[0]


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        rows: Tensor,
        tokens: Tensor | None,
        head: Tensor | None,
        options: tuple[Any, ...],
        mix: Mix,
        dtype: torch.dtype,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        given = hidden.to(dtype), weight.to(dtype), targets, rows, tokens, head, *options
        with torch.autocast(hidden.device.type, enabled=False):
            losses, d_hidden, d_weight = run_operator(_operator, _in_chunks, given, needs)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.hidden_dtype, ctx.weight_dtype = hidden.dtype, weight.dtype
        parts = losses.sum(0)
        ctx.mark_non_differentiable(parts)
        return (1 - mix.alpha) * parts[0] + mix.alpha * mix.temperature**2 * parts[1], parts

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return *scaled(ctx, grad_outputs[0]), *(None,) * 8


def _in_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor,
    tokens: Tensor | None,
    head: Tensor | None,
    vocab_size: int,
    softcap: float | None,
    teacher_softcap: float | None,
    common: int,
    alpha: float,
    temperature: float,
    kind: str,
    beta: float,
    chunk_tokens: int,
    hidden_learns: bool,
    weight_learns: bool,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy and divergence of each position [N, 2], and the gradients of the sum of their mix. An operator
    takes no named tuples."""
    needs = hidden_learns, weight_learns
    found = results(hidden, weight, needs, (2,))
    mix = Mix(alpha, temperature, kind, beta)
    constants = head, teacher_softcap, common, vocab_size, softcap, mix
    run_chunks(_chunk, hidden, weight, (targets, rows, tokens), constants, found, chunk_tokens, needs, compiled)
    return found


def _chunk(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher_rows: Tensor,
    tokens: Tensor | None,
    head: Tensor | None,
    teacher_softcap: float | None,
    common: int,
    vocab_size: int,
    softcap: float | None,
    mix: Mix,
    rows_learn: bool,
    d_weight: Tensor | None,
    first: bool,
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy and divergence [C, 2] of `rows` [C, D] and, if these learn, their gradient [C, D]; `d_weight`,
    `first`: see `back`."""
    wide, slope = capped(rows @ weight.T, vocab_size, softcap)  # [C, V]
    losses, normalizer = cross_entropy(wide, targets)
    apart, d_soft = _divergence(wide, Teacher(teacher_rows, tokens, head, teacher_softcap, common), mix)
    both = torch.stack([losses, torch.where(targets != IGNORE, apart, 0)], -1)
    if not rows_learn and d_weight is None:
        return both, None
    error = (1 - mix.alpha) * cross_entropy_error(wide, normalizer, targets)
    # The square of the temperature, over the temperature by which logits are divided.
    error = error + F.pad(mix.alpha * mix.temperature * d_soft, (0, wide.shape[-1] - common))
    error = error if slope is None else error * slope
    return both, back(error, targets, rows, weight, rows_learn, d_weight, first)


def _divergence(wide: Tensor, teacher: Teacher, mix: Mix) -> tuple[Tensor, Tensor]:
    """The divergence [C] of logits [C, V], and its gradient [C, M] with respect to the first M of them over the
    temperature."""
    ours = wide[:, : teacher.common]
    if teacher.tokens is None:
        assert teacher.head is not None, "a whole distribution is computed from hidden states"
        theirs, _ = capped(teacher.rows @ teacher.head[: teacher.common].T, teacher.common, teacher.softcap)
        log_p = soft_distribution(theirs.to(wide.dtype), mix.temperature)
        return divergence(log_p, soft_distribution(ours, mix.temperature), mix.divergence, mix.beta)
    index = teacher.tokens.long()
    log_q, others = lumped(ours, index, mix.temperature)
    # Again, because they are stored in 16 bits.
    log_p = teacher.rows.to(wide.dtype).log_softmax(-1)
    apart, slope = divergence(log_p, log_q, mix.divergence, mix.beta)
    return apart, spread(slope, others, index)


_operator = torch.library.custom_op("pretune::chunked_distillation", _in_chunks, mutates_args=())


@_operator.register_fake
def _(hidden: Tensor, weight: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, hidden_learns, weight_learns, _ = given
    return results(hidden, weight, (hidden_learns, weight_learns), (2,))
