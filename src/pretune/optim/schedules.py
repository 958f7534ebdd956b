"""Learning-rate schedules: pure functions from progress in [0, 1] to a factor on the peak learning rate.

Progress comes from the budget, so a schedule ends when the run does, whether the budget is in steps, tokens or seconds.
Nothing here depends on what is scaled, so other quantities (momentum, weight decay) could follow the same curves.

Relation to torch.optim.lr_scheduler.OneCycleLR with `total_steps` N, cosine annealing and constant momentum: `cycle` is
the same curve with initial = 1 / div_factor, final = initial / final_div_factor and warmup = pct_start, except on its
way up: OneCycleLR's first step is at `initial`, ours a step above it; both have their peak at step `pct_start * N - 1`
of 0..N-1. Where transformers' schedules are at step k + 1, ours are at step k: their first step has a rate of 0.
The schedule "cos" of epfml/llm-baselines is also OneCycleLR (div_factor 100, final_div_factor 0.1), that is, `cycle`
with initial 0.01 and final 0.1; our `cosine` differs from it in its linear warm-up.
"""

from __future__ import annotations

import math
from typing import assert_never

from pretune.optim.config import (
    ConstantConfig,
    CosineConfig,
    CycleConfig,
    LinearConfig,
    ScheduleConfig,
    TrapezoidConfig,
)


def schedule_factor(config: ScheduleConfig, progress: float) -> float:
    """The factor on the peak learning rate at `progress` in [0, 1]: between `initial` or `final`, and 1."""
    assert 0 <= progress <= 1, f"progress {progress}"
    warmup = config.warmup
    if progress < warmup:
        ease = _cosine if isinstance(config, CycleConfig) else _linear
        return _between(config.initial, 1.0, ease(progress / warmup))
    match config:
        case CosineConfig() | CycleConfig():
            return _between(1.0, config.final, _cosine(_part(progress, 1 - warmup)))
        case LinearConfig():
            return _between(1.0, config.final, _linear(_part(progress, 1 - warmup)))
        case TrapezoidConfig():
            ease = {"linear": _linear, "sqrt": math.sqrt, "cosine": _cosine}[config.shape]
            return _between(1.0, config.final, ease(_part(progress, config.decay)))
        case ConstantConfig():
            return 1.0
        case _:
            assert_never(config)


def _part(progress: float, last: float) -> float:
    """How much of the last part of the budget (a fraction `last`) is over: 0 before it, exactly 1 at the end."""
    return max(0.0, 1 - (1 - progress) / last) if last > 0 else 0.0


def _between(start: float, end: float, share: float) -> float:
    # Written so that both ends are exact to the last bit.
    return start * (1 - share) + end * share


def _linear(x: float) -> float:
    return x


def _cosine(x: float) -> float:
    return (1 - math.cos(math.pi * x)) / 2
