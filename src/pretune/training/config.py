"""Early stopping and averaging of the weights, as YAML says them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pretune.core.config import Count, Section


class EMAConfig(Section):
    decay: Annotated[float, Field(gt=0, lt=1)] | None
    """Share of the moving average that each step keeps: 0.999 averages over about the last 1,000 steps; null averages
    nothing."""
    warmup: bool
    """Let the decay grow as (1 + steps) / (10 + steps) up to its value, so that a short run forgets where it began."""
    evaluate_raw: bool
    """Evaluate the weights as they are too, as val_raw/loss and so on; val/loss is always that of the averages."""


class EarlyStoppingConfig(Section):
    patience: Count | None
    """End the run after this many evaluations in a row in which val/loss did not improve; null never does."""
    min_delta: Annotated[float, Field(ge=0)]
    """How far val/loss must fall, in nats, to count as an improvement."""
