"""Schedules: against torch's own schedulers, and properties that hold for any setting."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch.optim.lr_scheduler import LinearLR, LRScheduler, OneCycleLR, SequentialLR
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from pretune.optim.budget import Spent, next_step
from pretune.optim.config import BudgetConfig, ScheduleConfig
from pretune.optim.schedules import schedule_factor

KINDS = {
    "cosine": {"final"},
    "cycle": {"final"},
    "linear": {"final"},
    "constant": set(),
    "trapezoid": {"final", "decay", "shape"},
}


def schedule(kind: str, **settings: Any) -> ScheduleConfig:
    wanted = {"warmup", "initial", *KINDS[kind]}
    chosen = {key: value for key, value in settings.items() if key in wanted}
    return TypeAdapter(ScheduleConfig).validate_python({"kind": kind, **chosen})


def reference_curve(steps: int, make: Any) -> list[float]:
    """The learning rates that a torch scheduler sets, step by step, for a peak of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler: LRScheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step() if len(rates) < steps else None
    return rates


def one_cycle(steps: int, **settings: Any) -> list[float]:
    return reference_curve(
        steps, lambda optimizer: OneCycleLR(optimizer, 1.0, total_steps=steps, cycle_momentum=False, **settings)
    )


def our_curve(config: ScheduleConfig, steps: int) -> list[float]:
    return [schedule_factor(config, step / (steps - 1)) for step in range(steps)]


def run_curve(config: ScheduleConfig, steps: int) -> list[float]:
    """The factors of a run whose budget is that many steps."""
    budget = BudgetConfig(steps=steps, tokens=None, time=None, count=(), replay=None)
    progress = [next_step(budget, Spent(step, 0, 0.0), Spent(1, 1, 0.0), 1, 0.0).progress for step in range(steps)]
    return [schedule_factor(config, at) for at in progress]


def largest_difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("steps", "pct_start", "div_factor", "final_div_factor"),
    [(10_000, 0.3, 25.0, 1e4), (8_780, 0.05, 100.0, 0.1), (101, 0.5, 10.0, 100.0), (7, 0.3, 25.0, 1e4)],
)
def test_cycle_is_torchs_one_cycle(steps: int, pct_start: float, div_factor: float, final_div_factor: float):
    reference = one_cycle(steps, pct_start=pct_start, div_factor=div_factor, final_div_factor=final_div_factor)
    warmup = (pct_start * steps - 1) / (steps - 1)  # the peak in the same place
    ours = schedule("cycle", warmup=warmup, initial=1 / div_factor, final=1 / div_factor / final_div_factor)
    assert largest_difference(our_curve(ours, steps), reference) < 1e-12


def test_a_run_with_the_reference_systems_cycle_has_its_curve_but_for_a_step_on_the_way_up():
    ours = run_curve(schedule("cycle", warmup=0.3, initial=0.04, final=4e-6), 10_000)
    reference = one_cycle(10_000, pct_start=0.3, div_factor=25.0, final_div_factor=1e4)
    peak = 2999
    assert ours[peak:] == pytest.approx(reference[peak:], abs=1e-12)
    assert (
        largest_difference(ours[:peak], reference[:peak]) < math.pi / 2 / peak
    )  # of the peak: a step where it is steepest
    assert ours[0] > reference[0]


@pytest.mark.parametrize(("steps", "warm"), [(1, 0), (1, 1), (2, 1), (100, 0), (100, 7), (1000, 1000)])
def test_a_run_is_one_step_ahead_of_transformers_whose_first_step_is_at_zero(steps: int, warm: int):
    """So the first step has the rate peak / warm, as where `step + 1` is counted, and the last one ends the decay."""
    for kind, make in (("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)):
        reference = reference_curve(steps + 1, lambda optimizer, make=make: make(optimizer, warm, steps))
        if warm:
            assert reference[0] == 0.0
        ours = run_curve(schedule(kind, warmup=warm / steps, initial=0.0, final=0.0), steps)
        if warm < steps:
            assert ours == pytest.approx(reference[1:], abs=1e-12)
        assert ours[:warm] == pytest.approx([(step + 1) / warm for step in range(warm)])


def test_cosine_is_linear_warmup_and_then_torchs_cosine():
    steps, warm = 201, 40

    def make(optimizer: torch.optim.Optimizer) -> LRScheduler:
        up = LinearLR(optimizer, 0.1, 1.0, warm)
        down = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.1 + 0.9 * (1 + math.cos(math.pi * step / (steps - 1 - warm))) / 2
        )
        return SequentialLR(optimizer, [up, down], [warm])

    config = schedule("cosine", warmup=warm / (steps - 1), initial=0.1, final=0.1)
    assert largest_difference(our_curve(config, steps), reference_curve(steps, make)) < 1e-12


@pytest.mark.parametrize(("shape", "halfway"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_trapezoid_holds_the_peak_and_decays_in_its_last_part(shape: str, halfway: float):
    config = schedule("trapezoid", warmup=0.1, decay=0.4, shape=shape, initial=0.0, final=0.0)
    assert schedule_factor(config, 0.05) == pytest.approx(0.5)
    assert [schedule_factor(config, p) for p in (0.1, 0.3, 0.6)] == pytest.approx([1, 1, 1])
    assert schedule_factor(config, 0.8) == pytest.approx(halfway)
    assert schedule_factor(config, 1.0) == 0


fractions = st.floats(0, 1)


@st.composite
def schedules(draw: st.DrawFn) -> ScheduleConfig:
    warmup = draw(fractions)
    return schedule(
        draw(st.sampled_from(sorted(KINDS))),
        warmup=warmup,
        initial=draw(fractions),
        final=draw(fractions),
        decay=draw(st.floats(0, math.nextafter(1 - warmup, 0))) if warmup < 1 else 0.0,
        shape=draw(st.sampled_from(["linear", "sqrt", "cosine"])),
    )


@given(schedules(), fractions)
def test_factors_stay_between_the_ends_and_the_peak(config: ScheduleConfig, progress: float):
    lowest = min(config.initial, getattr(config, "final", 1.0))
    assert lowest - 1e-15 <= schedule_factor(config, progress) <= 1 + 1e-15


@given(schedules())
def test_the_ends_are_exact(config: ScheduleConfig):
    if config.warmup > 0:
        assert schedule_factor(config, 0.0) == config.initial
    last = getattr(config, "decay", 1 - config.warmup)
    if config.kind != "constant" and last > 0:
        assert schedule_factor(config, 1.0) == getattr(config, "final")  # noqa: B009
    else:
        assert schedule_factor(config, 1.0) == 1.0


@given(schedules(), fractions)
def test_curves_have_no_jumps(config: ScheduleConfig, progress: float):
    """The factor is continuous: no steeper than the steepest piece (half a cosine: pi / 2 over its width)."""
    step = 1e-6
    after = min(1.0, progress + step)
    widths = [config.warmup, getattr(config, "decay", 1 - config.warmup)]
    widest_slope = sum(math.pi / 2 / width for width in widths if width > 0)
    # One minus a root is vertical where it starts.
    root = sum(math.sqrt(step / width) for width in widths[1:] if width > 0)
    difference = abs(schedule_factor(config, after) - schedule_factor(config, progress))
    assert difference <= widest_slope * step + root + 1e-9


def test_no_warmup_starts_at_the_peak_and_nothing_but_warmup_ends_there():
    for kind in KINDS:
        settings = {"initial": 0.2, "final": 0.1, "decay": 0.0, "shape": "linear"}
        assert schedule_factor(schedule(kind, warmup=0.0, **settings), 0.0) == 1.0
        whole = schedule(kind, warmup=1.0, **settings)
        assert schedule_factor(whole, 0.0) == pytest.approx(0.2)
        assert schedule_factor(whole, 0.5) == pytest.approx(0.6)
        assert schedule_factor(whole, 1.0) == 1.0
