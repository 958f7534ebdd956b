"""Progress through a training budget, and the choice of the last step.

A step runs at the progress at which it ends. So the first one is a step ahead of the start, where a warm-up has a rate
of 0 (a step at that rate would be lost), and the last one runs at progress 1: the schedule ends exactly when the run
does. In steps and tokens, the last step is the one that reaches the limit. In seconds, as a step cannot be interrupted,
it is the step after which another one would end further from the limit, and it reads as many whole micro-batches as
still fit. Whether a step is the last is decided before it runs. A run thus ends within half a micro-batch of its time
limit, give or take how much its last two steps deviate from the usual step time; earlier slow steps are compensated
for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from pretune.optim.config import BudgetConfig

REMEMBERED = 15
"""Number of recent steps from which the time of the next one is estimated."""


class Step(NamedTuple):
    """A step that is about to run."""

    progress: float
    """Its position in the schedule, in [0, 1]: where in the budget it ends; 1 for the last step only."""
    tokens: int
    """Number of input tokens that it reads."""


@dataclass(frozen=True)
class Spent:
    """What training has used so far, or what one step uses.

    seconds: the caller excludes time that the budget does not count, and includes the time of earlier sessions of the
    run and the time reserved for work after the last step.
    """

    steps: int
    tokens: int
    seconds: float


def next_step(budget: BudgetConfig, spent: Spent, cost: Spent, micro_batch: int, before: float) -> Step:
    """The next step of a run that has used `spent`.

    cost: what a full step is expected to use; its seconds may be too few until a step has been timed. micro_batch:
    tokens per micro-batch, a divisor of `cost.tokens`. before: progress of the previous step; progress never decreases.
    With several limits, the one with the most progress counts.
    """
    progress, tokens = before, cost.tokens
    if budget.steps is not None:
        progress = max(progress, _progress(budget.steps, spent.steps, cost.steps))
    if budget.tokens is not None:
        progress = max(progress, _progress(budget.tokens, spent.tokens, cost.tokens))
    if budget.time is not None:
        pieces, left = cost.tokens // micro_batch, max(budget.time - spent.seconds, 0)
        unused = cost.seconds / pieces / 2  # half a micro-batch: with less left, stopping is closer to the limit
        progress = max(progress, _progress(budget.time, spent.seconds, cost.seconds, unused))
        if cost.seconds > left:
            tokens = micro_batch * max(round(left / cost.seconds * pieces), 1)
    return Step(progress, tokens)


def usual(seconds: Sequence[float]) -> float:
    """The expected duration of the next step, from those of the newest steps; 0 if there are none.

    The median: it is as likely too long as too short, and a single slow step does not move it.
    """
    return median(seconds) if seconds else 0.0


def _progress(limit: float, spent: float, cost: float, unused: float = 0.0) -> float:
    """Progress towards one limit once `cost` is spent too: 1 for the last step, after which up to `unused` is left."""
    return 1.0 if spent + cost + unused >= limit else (spent + cost) / limit
