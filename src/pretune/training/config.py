"""Configuration of early stopping, of divergence and of the weight average (EMA)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pretune.core.config import Count, Section


class EMAConfig(Section):
    decay: Annotated[float, Field(gt=0, lt=1)] | None
    """Decay of the exponential moving average (EMA) per step: 0.999 averages over about the last 1,000 steps; null
    turns EMA off."""
    warmup: bool
    """Increase the decay as (1 + steps) / (10 + steps) up to its value, so that a short run forgets its initial
    weights."""
    evaluate_raw: bool
    """Also evaluate the raw weights, as val_raw/loss and so on; val/loss is always that of the averages."""


class EarlyStoppingConfig(Section):
    patience: Count | None
    """End the run after this many consecutive evaluations without an improvement of val/loss; null never does."""
    min_delta: Annotated[float, Field(ge=0)]
    """How much val/loss must fall, in nats, to count as an improvement."""


class DivergenceConfig(Section):
    patience: Count | None
    """End the run with exit code 3 after this many steps in a row whose loss or gradient is not finite, at the next
    report (log_every); null never does. In float16, a step that succeeds with a smaller loss scale is finite."""
