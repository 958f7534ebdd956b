"""How much of a budget is spent, and when it ends.

A step cannot be cut, so a budget ends with the last step that fits, and that step runs at progress 1: the schedule is
at its end exactly when the run is. In steps and tokens the last step is the one that reaches the limit. In seconds it
is the one that ends nearest to the limit, by the time that a step usually takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pretune.optim.config import BudgetConfig


@dataclass(frozen=True)
class Spent:
    """What training has used so far, or what one step uses.

    seconds are training time: the caller leaves out what the budget is not meant to pay for, and adds what earlier
    sessions of the run have used.
    """

    steps: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class _Account:
    """One limit, with what is spent of it, what the next step costs, and how much of a step may be left over."""

    limit: float
    spent: float
    cost: float
    leftover: float

    @property
    def finished(self) -> bool:
        return self.spent >= self.limit - self.leftover

    @property
    def progress(self) -> float:
        if self.spent + self.cost >= self.limit - self.leftover:
            return 1.0
        return self.spent / (self.limit - self.cost)


def progress(budget: BudgetConfig, spent: Spent, step_cost: Spent) -> float:
    """Where in [0, 1] of the schedule the next step runs: 0 for a first step, 1 for the last one that fits.

    `step_cost` is what that step is expected to use; until a step has been timed its seconds may be 0. Of several
    limits the one nearest to its end counts. A budget of a single step runs it at 1.
    """
    return max(account.progress for account in _accounts(budget, spent, step_cost))


def finished(budget: BudgetConfig, spent: Spent, step_cost: Spent) -> bool:
    """Whether one of the limits is reached: steps and tokens to the full, seconds to within half a step."""
    return any(account.finished for account in _accounts(budget, spent, step_cost))


def _accounts(budget: BudgetConfig, spent: Spent, step_cost: Spent) -> Iterator[_Account]:
    if budget.steps is not None:
        yield _Account(budget.steps, spent.steps, step_cost.steps, leftover=0)
    if budget.tokens is not None:
        yield _Account(budget.tokens, spent.tokens, step_cost.tokens, leftover=0)
    if budget.time is not None:
        yield _Account(budget.time, spent.seconds, step_cost.seconds, leftover=step_cost.seconds / 2)
