"""Budgets: whole runs, simulated step by step."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretune.optim.budget import Spent, finished, progress
from pretune.optim.config import BudgetConfig


def budget(steps: int | None = None, tokens: int | None = None, time: float | None = None) -> BudgetConfig:
    return BudgetConfig(steps=steps, tokens=tokens, time=time)


def simulate(
    budget: BudgetConfig, tokens: int = 100, seconds: Callable[[], float] = lambda: 1.0
) -> tuple[Spent, list[float]]:
    """Run until finished; a step's cost is guessed as a running mean, as a loop would."""
    spent, usual, trace = Spent(0, 0, 0.0), 0.0, []
    while not finished(budget, spent, Spent(1, tokens, usual)):
        trace.append(progress(budget, spent, Spent(1, tokens, usual)))
        took = seconds()
        usual = took if usual == 0 else 0.9 * usual + 0.1 * took
        spent = Spent(spent.steps + 1, spent.tokens + tokens, spent.seconds + took)
        assert len(trace) < 100_000
    return spent, trace


@given(st.integers(1, 2000))
def test_steps_are_exact_and_evenly_spaced(steps: int):
    spent, trace = simulate(budget(steps=steps))
    assert spent.steps == steps
    expected = [step / (steps - 1) for step in range(steps)] if steps > 1 else [1.0]
    assert trace == pytest.approx(expected)
    assert trace[-1] == 1.0


@given(st.integers(1, 100_000), st.integers(1, 5_000).filter(lambda n: n >= 50))
def test_tokens_end_with_the_step_that_reaches_the_limit(limit: int, per_step: int):
    spent, trace = simulate(budget(tokens=limit), tokens=per_step)
    assert spent.steps == math.ceil(limit / per_step)
    assert trace[-1] == 1.0
    assert trace == sorted(trace)


@given(
    st.integers(0, 2**32),
    st.floats(100, 2000),
    st.floats(1e-4, 30),
    st.sampled_from([0.0, 0.05, 0.3]),
    st.sampled_from([0.0, 0.02]),
)
def test_time_ends_within_one_percent_with_the_schedule_at_its_end(
    seed: int, steps: float, usual: float, noise: float, hiccups: float
):
    """Steps of uneven length, a few of them several times as long; budgets of a hundred steps and more."""
    generator = random.Random(seed)

    def seconds() -> float:
        slow = 3.0 if generator.random() < hiccups else 1.0
        return usual * slow * generator.uniform(1 - noise, 1 + noise)

    limit = steps * usual * (1 + 2 * hiccups)
    spent, trace = simulate(budget(time=limit), seconds=seconds)
    longest = usual * (1 + noise) * (3.0 if hiccups else 1.0)
    assert abs(spent.seconds - limit) <= max(0.01 * limit, longest)
    if not hiccups:
        assert abs(spent.seconds - limit) <= 0.01 * limit
        assert trace[-1] >= 0.985
    if noise <= 0.05 and not hiccups:
        assert trace[-1] >= 0.99
        assert trace == sorted(trace)


def test_time_with_even_steps_ends_at_exactly_one():
    for limit in (100.0, 100.3, 100.49, 100.51, 100.9):
        spent, trace = simulate(budget(time=limit))
        assert spent.seconds == round(limit)
        assert trace[-1] == 1.0


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        (budget(steps=50, tokens=10_000, time=1000.0), 50),
        (budget(steps=500, tokens=3_000, time=1000.0), 30),
        (budget(steps=500, tokens=30_000, time=20.0), 20),
        (budget(tokens=30_000, time=20.0), 20),
        (budget(steps=20, time=20.0), 20),
    ],
)
def test_the_first_limit_reached_ends_the_run_and_its_schedule(limits: BudgetConfig, steps: int):
    spent, trace = simulate(limits)
    assert spent.steps == steps
    assert trace[0] == 0.0
    assert trace[-1] == 1.0


@given(
    st.builds(Spent, st.integers(0, 10**9), st.integers(0, 10**12), st.floats(0, 1e9)),
    st.builds(Spent, st.integers(1, 1), st.integers(1, 10**9), st.floats(0, 1e9)),
    st.integers(1, 10**9) | st.none(),
    st.integers(1, 10**12) | st.none(),
    st.floats(1e-9, 1e9),
)
def test_progress_is_a_share_whatever_the_numbers(
    spent: Spent, cost: Spent, steps: int | None, tokens: int | None, time: float
):
    assert 0 <= progress(budget(steps, tokens, time), spent, cost) <= 1


def test_a_resumed_run_goes_on_with_the_clock_it_had():
    whole = budget(time=1000.0)
    before = Spent(400, 0, 400.0)
    assert progress(whole, before, Spent(1, 0, 1.0)) == pytest.approx(400 / 999)
    assert finished(whole, Spent(1000, 0, 999.6), Spent(1, 0, 1.0))
    assert not finished(whole, Spent(999, 0, 999.4), Spent(1, 0, 1.0))


def test_a_first_step_longer_than_the_whole_budget_is_taken_once():
    spent, _ = simulate(budget(time=0.5))
    assert spent.steps == 1
