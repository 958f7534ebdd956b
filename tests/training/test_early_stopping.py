"""When a run no longer improves, against the plateaus that torch detects."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pretune.training.early_stopping import best, evaluations_without_improvement, out_of_patience, why_stopped

# Few different values, so that equal ones and near misses are common.
values = st.one_of(st.integers(0, 8).map(lambda n: n / 4), st.floats(0, 2), st.just(math.nan), st.just(math.inf))
losses = st.lists(values, max_size=30).map(lambda values: [(10 * index, loss) for index, loss in enumerate(values)])
deltas = st.sampled_from([0.0, 0.1, 0.25, 1.0])


@given(losses, deltas)
def test_it_counts_as_torch_counts_bad_epochs(losses: list[tuple[int, float]], min_delta: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    plateau = ReduceLROnPlateau(optimizer, patience=10**6, threshold=min_delta, threshold_mode="abs")
    for _, loss in losses:
        plateau.step(loss)
    assert evaluations_without_improvement(losses, min_delta) == plateau.num_bad_epochs


@given(losses, deltas, st.integers(1, 5))
def test_a_run_ends_once_and_never_at_its_best(
    losses: list[tuple[int, float]], min_delta: float, patience: int
) -> None:
    ends = [n for n in range(len(losses) + 1) if out_of_patience(losses[:n], patience, min_delta)]
    if ends:
        seen = losses[: ends[0]]
        assert len(seen) >= patience
        lowest = best(seen)
        assert lowest is None or min_delta or lowest[0] < seen[-patience][0]
        assert f"in {patience} evaluations" in why_stopped(seen, min_delta)
    assert not out_of_patience(losses, None, min_delta)


@given(losses)
def test_the_best_is_the_first_of_the_lowest(losses: list[tuple[int, float]]) -> None:
    numbers = [loss for _, loss in losses if math.isfinite(loss)]
    expected = next(((step, loss) for step, loss in losses if numbers and loss == min(numbers)), None)
    assert best(losses) == expected


def test_small_steps_add_up() -> None:
    creeping = [(step, 3 - 0.01 * step) for step in range(12)]
    assert [evaluations_without_improvement(creeping[:n], 0.025) for n in range(1, 8)] == [0, 1, 2, 0, 1, 2, 0]


def test_the_reason_is_said_in_a_line() -> None:
    losses = [(0, 3.0), (10, 2.5), (20, 2.7), (1000, 2.6)]
    assert why_stopped(losses, 0.0) == (
        "stopped early at step 1,000: val/loss has not fallen in 2 evaluations; the lowest was 2.5000 at step 10"
    )
    assert "has not fallen by more than 0.1 in 1 evaluations" in why_stopped([(0, math.nan)], 0.1)


def test_nothing_is_best_where_nothing_is_a_number() -> None:
    assert best([]) is None
    assert best([(1, math.nan), (2, math.inf)]) is None
    assert best([(1, math.nan), (2, 2.0)]) == (2, 2.0)
