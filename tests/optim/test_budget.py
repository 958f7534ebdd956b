"""Budgets: whole runs, simulated step by step."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretune.optim.budget import REMEMBERED, Spent, Step, next_step, usual
from pretune.optim.config import BudgetConfig


def budget(steps: int | None = None, tokens: int | None = None, time: float | None = None) -> BudgetConfig:
    return BudgetConfig(steps=steps, tokens=tokens, time=time, count=(), replay=None)


def simulate(
    budget: BudgetConfig, tokens: int = 100, seconds: Callable[[], float] = lambda: 1.0, micro_batch: int | None = None
) -> tuple[Spent, list[float]]:
    """Run until the last step, as the loop does; `seconds` draws the duration of a whole step."""
    spent, newest, trace = Spent(0, 0, 0.0), [], [0.0]
    while trace[-1] < 1:
        cost = Spent(1, tokens, tokens * usual(newest[-REMEMBERED:]))
        step = next_step(budget, spent, cost, micro_batch or tokens, trace[-1])
        assert step.tokens == tokens or step.progress == 1, "only the last step may be smaller"
        assert 0 < step.tokens <= tokens
        assert step.tokens % (micro_batch or tokens) == 0
        took = seconds() * step.tokens / tokens
        trace.append(step.progress)
        newest.append(took / step.tokens)
        spent = Spent(spent.steps + 1, spent.tokens + step.tokens, spent.seconds + took)
        assert len(trace) < 100_000
    return spent, trace[1:]


def noisy(seed: int, noise: float, hiccups: float = 0.0) -> Callable[[], float]:
    """Steps of about a second, with a share of them three times as long."""
    generator = random.Random(seed)
    return lambda: generator.uniform(1 - noise, 1 + noise) * (3.0 if generator.random() < hiccups else 1.0)


@given(st.integers(1, 2000))
def test_steps_are_exact_and_evenly_spaced(steps: int):
    spent, trace = simulate(budget(steps=steps))
    assert spent.steps == steps
    assert trace == pytest.approx([step / steps for step in range(1, steps + 1)])
    assert trace[-1] == 1.0


@given(st.integers(1, 100_000), st.integers(1, 5_000).filter(lambda n: n >= 50))
def test_tokens_end_with_the_step_that_reaches_the_limit(limit: int, per_step: int):
    spent, trace = simulate(budget(tokens=limit), tokens=per_step)
    assert spent.steps == math.ceil(limit / per_step)
    assert trace[-1] == 1.0
    assert trace == sorted(trace)


@given(st.integers(0, 2**32), st.floats(60, 2000), st.sampled_from([0.0, 0.03, 0.3]), st.sampled_from([4, 10, 100]))
def test_time_ends_within_one_percent_where_a_step_has_parts(seed: int, steps: float, noise: float, pieces: int):
    """Sixty uneven steps of at least four micro-batches are enough."""
    spent, trace = simulate(budget(time=steps), 100, noisy(seed, noise), micro_batch=100 // pieces)
    assert abs(spent.seconds - steps) <= 0.01 * steps
    assert trace == sorted(trace)
    assert trace.count(1.0) == 1


@given(st.integers(0, 2**32), st.floats(60, 2000), st.sampled_from([0.0, 0.02, 0.05, 0.3]))
def test_steps_of_one_micro_batch_end_within_half_a_step(seed: int, steps: float, noise: float):
    """Within what the last two steps differ from the usual: 1% from 60 steps on, if they hardly differ."""
    spent, trace = simulate(budget(time=steps), seconds=noisy(seed, noise))
    assert abs(spent.seconds - steps) <= 0.5 + 3.5 * noise
    assert trace[-1] == 1.0


def test_of_many_uneven_runs_nearly_all_end_within_one_percent():
    """One step in fifty takes three times as long; only a slow one among the last two does harm."""
    runs = [simulate(budget(time=100), 100, noisy(seed, 0.1, 0.02), micro_batch=25)[0] for seed in range(300)]
    within = sum(abs(spent.seconds - 100) <= 1 for spent in runs)
    assert within >= 0.95 * len(runs)


def test_a_slow_step_before_the_end_is_made_up_for():
    times = iter([1.0] * 20 + [9.0] + [1.0] * 200)
    spent, trace = simulate(budget(time=100.0), seconds=lambda: next(times))
    assert (spent.steps, spent.seconds) == (92, 100.0)
    assert trace[-1] == 1.0


def test_a_slow_step_at_the_very_end_still_lets_the_schedule_end():
    times = iter([1.0] * 98 + [3.0] + [1.0])
    spent, trace = simulate(budget(time=100.0), 100, lambda: next(times), micro_batch=25)
    assert trace[-1] == 1.0
    assert spent.seconds == 101.25, "one micro-batch more, at the schedule's end"


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
    assert trace[-1] == 1.0


@given(
    st.builds(Spent, st.integers(0, 10**9), st.integers(0, 10**12), st.floats(0, 1e9)),
    st.builds(Spent, st.integers(1, 1), st.integers(1, 10**9).map(lambda n: 4 * n), st.floats(0, 1e9)),
    st.integers(1, 10**9) | st.none(),
    st.integers(1, 10**12) | st.none(),
    st.floats(1e-9, 1e9),
    st.floats(0, 1),
)
def test_a_step_is_sound_whatever_the_numbers(
    spent: Spent, cost: Spent, steps: int | None, tokens: int | None, time: float, before: float
):
    step = next_step(budget(steps, tokens, time), spent, cost, cost.tokens // 4, before)
    assert before <= step.progress <= 1
    assert step.tokens in (cost.tokens // 4 * n for n in (1, 2, 3, 4))


def test_a_resumed_run_goes_on_with_the_clock_it_had():
    whole, cost = budget(time=1000.0), Spent(1, 8, 1.0)
    assert next_step(whole, Spent(400, 0, 400.0), cost, 8, 0.0) == (pytest.approx(401 / 1000), 8)
    assert next_step(whole, Spent(999, 0, 999.0), cost, 8, 0.0) == Step(1.0, 8)
    assert next_step(whole, Spent(999, 0, 999.4), cost, 2, 0.0) == Step(1.0, 4)


def test_a_first_step_longer_than_the_whole_budget_is_followed_by_the_last():
    spent, trace = simulate(budget(time=0.5))
    assert (spent.steps, trace) == (2, [0.0, 1.0])


def test_the_usual_is_not_moved_by_a_slow_step():
    assert usual([]) == 0
    assert usual([2.0, 2.0, 50.0, 2.0]) == 2.0
