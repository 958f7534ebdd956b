"""Optimizer, schedule and budget, as YAML says them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

from pretune.config import Fraction, Seconds, Section

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerBase(Section):
    lr: Positive
    """Peak learning rate; the schedule multiplies it."""
    weight_decay: NotNegative
    """Decoupled decay, on matrices only (never on norms, biases or scalars)."""
    clip_norm: Positive | None
    """Gradients with a larger global norm are scaled down to it; null never clips."""


class AdamWConfig(OptimizerBase):
    kind: Literal["adamw"]
    """AdamW (arXiv:1711.05101), fused."""
    betas: tuple[Beta, Beta]
    """Decay of the running mean and of the running square of the gradient."""
    eps: Positive
    """Added to the root of the running square."""


class LionConfig(OptimizerBase):
    kind: Literal["lion"]
    """Lion (arXiv:2302.06675), by lion-pytorch; wants a learning rate 3 to 10 times smaller than AdamW's."""
    betas: tuple[Beta, Beta]
    """Interpolation for the update and decay of the momentum."""


OptimizerConfig = Annotated[AdamWConfig | LionConfig, Field(discriminator="kind")]


class CosineConfig(Section):
    kind: Literal["cosine"]
    """Linear warm-up, then half a cosine down."""
    warmup: Fraction
    """Share of the budget spent warming up."""
    initial: Fraction
    """Factor on the learning rate at the very start."""
    final: Fraction
    """Factor at the end of the budget."""


class CycleConfig(Section):
    kind: Literal["cycle"]
    """One cycle (arXiv:1708.07120): half a cosine up, half a cosine down; momentum is left alone."""
    warmup: Fraction
    """Share of the budget spent going up."""
    initial: Fraction
    """Factor on the learning rate at the very start."""
    final: Fraction
    """Factor at the end of the budget."""


class ConstantConfig(Section):
    kind: Literal["constant"]
    """Linear warm-up, then the peak to the end."""
    warmup: Fraction
    """Share of the budget spent warming up."""
    initial: Fraction
    """Factor on the learning rate at the very start."""


ScheduleConfig = Annotated[CosineConfig | CycleConfig | ConstantConfig, Field(discriminator="kind")]


class BudgetConfig(Section):
    """Any subset of steps, tokens and time; the first one reached ends the run, and the schedule ends with it."""

    steps: Annotated[int, Field(ge=1)] | None
    """Optimizer steps."""
    tokens: Annotated[int, Field(ge=1)] | None
    """Input tokens, over all ranks."""
    time: Seconds | None
    """Training time: seconds, or text such as 90s, 5m, 3h. Evaluation, checkpoints and compilation do not count."""

    @pydantic.model_validator(mode="after")
    def _something(self) -> Self:
        if self.steps is None and self.tokens is None and self.time is None:
            raise ValueError("a budget of nothing: set at least one of steps, tokens, time")
        return self
