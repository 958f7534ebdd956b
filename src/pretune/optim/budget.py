"""How much of a budget is spent, and when it ends.

A step cannot be cut in the middle, so a budget ends with a last step, and that one runs at progress 1: the schedule is
at its end exactly when the run is. In steps and tokens the last step is the one that reaches the limit. In seconds it
is the one after which nothing more would bring the end nearer to the limit, and it reads as many whole micro-batches as
still fit. Which step is the last is settled before it runs. A run thus ends within half a micro-batch of its time, give
or take what its last two steps differ from what steps usually take; slow ones before them are made up for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from pretune.optim.config import BudgetConfig

REMEMBERED = 15
"""Steps that tell what the next one takes."""


class Step(NamedTuple):
    """A step to come."""

    progress: float
    """Where in [0, 1] of the schedule it runs: 1 for the last step and no other."""
    tokens: int
    """Input tokens that it reads."""


@dataclass(frozen=True)
class Spent:
    """What training has used so far, or what one step uses.

    seconds: the caller leaves out what the budget is not meant to pay for, and adds what earlier sessions of the run
    have used and what must still be paid for after the last step.
    """

    steps: int
    tokens: int
    seconds: float


def next_step(budget: BudgetConfig, spent: Spent, cost: Spent, micro_batch: int, before: float) -> Step:
    """The next step of a run that has `spent` so much.

    cost: what a whole step is expected to use; until one has been timed its seconds may be 0. micro_batch: tokens of
    one; they divide `cost.tokens`. before: progress of the step before; nothing goes back. Of several limits the one
    nearest to its end counts.
    """
    progress, tokens = before, cost.tokens
    if budget.steps is not None:
        progress = max(progress, _progress(budget.steps, spent.steps, cost.steps))
    if budget.tokens is not None:
        progress = max(progress, _progress(budget.tokens, spent.tokens, cost.tokens))
    if budget.time is not None:
        pieces, left = cost.tokens // micro_batch, max(budget.time - spent.seconds, 0)
        unused = cost.seconds / pieces / 2
        progress = max(progress, _progress(budget.time, spent.seconds, cost.seconds, unused))
        if cost.seconds > left:
            tokens = micro_batch * max(round(left / cost.seconds * pieces), 1)
    return Step(progress, tokens)


def usual(seconds: Sequence[float]) -> float:
    """What the next one is expected to take, from what the newest ones took; 0 where there are none.

    Their median: over as likely as under, and a single slow step does not move it.
    """
    return median(seconds) if seconds else 0.0


def _progress(limit: float, spent: float, cost: float, unused: float = 0.0) -> float:
    """Progress by one limit, of which `unused` may be left over: 0 for the first step, 1 for the last."""
    return 1.0 if spent + cost + unused >= limit else spent / (limit - cost)
