"""Early stopping: the best evaluation of a run, and whether it is still improving."""

from __future__ import annotations

import math
from collections.abc import Sequence

Losses = Sequence[tuple[int, float]]
"""Step and validation loss of each evaluation, in order."""


def best(losses: Losses) -> tuple[int, float] | None:
    """Step and loss of the evaluation with the lowest loss, the first of ties; None if none is finite."""
    return min(((step, loss) for step, loss in losses if math.isfinite(loss)), key=lambda one: one[1], default=None)


def evaluations_without_improvement(losses: Losses, min_delta: float) -> int:
    """The number of evaluations since the last improvement by more than `min_delta`.

    A loss is compared with the last one that counted as an improvement, not with the previous one, so that small gains
    add up. NaN is never an improvement. torch's ReduceLROnPlateau counts bad epochs in the same way.
    """
    reference, count = math.inf, 0
    for _, loss in losses:
        better = loss < reference - min_delta
        reference, count = (loss, 0) if better else (reference, count + 1)
    return count


def out_of_patience(losses: Losses, patience: int | None, min_delta: float) -> bool:
    """Whether to stop because the validation loss has not improved for `patience` evaluations; never for None."""
    return patience is not None and evaluations_without_improvement(losses, min_delta) >= patience


def why_stopped(losses: Losses, min_delta: float) -> str:
    """One line that says why the run was stopped at its last evaluation."""
    count, lowest = evaluations_without_improvement(losses, min_delta), best(losses)
    at_best = f"; the lowest was {lowest[1]:.4f} at step {lowest[0]:,}" if lowest else ""
    by = f" by more than {min_delta}" if min_delta else ""
    return f"stopped early at step {losses[-1][0]:,}: val/loss has not fallen{by} in {count} evaluations{at_best}"
