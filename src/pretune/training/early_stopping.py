"""What a run's evaluations say of its course: the best of them, and whether it still gets better."""

from __future__ import annotations

import math
from collections.abc import Sequence

Losses = Sequence[tuple[int, float]]
"""Step and validation loss of each evaluation, in order."""


def best(losses: Losses) -> tuple[int, float] | None:
    """Step and loss of the evaluation with the lowest loss, the first of equals; None where none is finite."""
    return min(((step, loss) for step, loss in losses if math.isfinite(loss)), key=lambda one: one[1], default=None)


def evaluations_without_improvement(losses: Losses, min_delta: float) -> int:
    """How many evaluations, up to the last, have not been lower by more than `min_delta` than the last that was.

    Small steps add up: a loss is compared with the last that counted as an improvement, not with the one before. What
    is not a number is no improvement. ReduceLROnPlateau of torch counts its bad epochs the same way.
    """
    reference, count = math.inf, 0
    for _, loss in losses:
        better = loss < reference - min_delta
        reference, count = (loss, 0) if better else (reference, count + 1)
    return count


def out_of_patience(losses: Losses, patience: int | None, min_delta: float) -> bool:
    """Whether a run ends here because its validation loss has not become better for too long; never for None."""
    return patience is not None and evaluations_without_improvement(losses, min_delta) >= patience


def why_stopped(losses: Losses, min_delta: float) -> str:
    """A line that says why a run ended at its last evaluation."""
    count, lowest = evaluations_without_improvement(losses, min_delta), best(losses)
    at_best = f"; the lowest was {lowest[1]:.4f} at step {lowest[0]:,}" if lowest else ""
    by = f" by more than {min_delta}" if min_delta else ""
    return f"stopped early at step {losses[-1][0]:,}: val/loss has not fallen{by} in {count} evaluations{at_best}"
