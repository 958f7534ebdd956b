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
    """Peak learning rate; the schedule multiplies it, and every other learning rate of the section."""
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


class MuonAdamWConfig(Section):
    """AdamW for what Muon does not take: embeddings, head, norms, biases and scalars."""

    embedding_lr: Positive
    """Peak learning rate of embedding tables (of the head too, where the two are tied)."""
    head_lr: Positive
    """Peak learning rate of an output head of its own, and of any other matrix outside the layers."""
    scalar_lr: Positive
    """Peak learning rate of norms, biases and scalars."""
    betas: tuple[Beta, Beta]
    """Decay of the running mean and of the running square of the gradient."""
    eps: Positive
    """Added to the root of the running square."""
    weight_decay: NotNegative
    """Decoupled decay of embeddings and head."""


class MuonConfig(OptimizerBase):
    kind: Literal["muon"]
    """Muon (kellerjordan.github.io/posts/muon) for the matrices inside the layers, AdamW for everything else."""
    momentum: Beta
    """Decay of the running gradient that is orthogonalized."""
    nesterov: bool
    """Look one momentum step ahead."""
    ns_steps: Annotated[int, Field(ge=1, lt=100)]
    """Newton-Schulz iterations of the orthogonalization."""
    scale: Literal["original", "match_rms_adamw"]
    """How a matrix' shape scales its learning rate: sqrt(max(1, rows / columns)), or 0.2 sqrt(max(rows, columns)),
    which suits learning rates tuned for AdamW (arXiv:2502.16982)."""
    adamw: MuonAdamWConfig
    """The rest of the parameters."""


OptimizerConfig = Annotated[AdamWConfig | LionConfig | MuonConfig, Field(discriminator="kind")]


class ScheduleBase(Section):
    warmup: Fraction
    """Share of the budget spent going up to the peak."""
    initial: Fraction
    """Factor on the learning rate at the very start (with warmup = 0 it is never used)."""


class CosineConfig(ScheduleBase):
    kind: Literal["cosine"]
    """Linear warm-up, then half a cosine down."""
    final: Fraction
    """Factor at the end of the budget."""


class CycleConfig(ScheduleBase):
    kind: Literal["cycle"]
    """One cycle (arXiv:1708.07120): half a cosine up, half a cosine down; momentum is left alone."""
    final: Fraction
    """Factor at the end of the budget."""


class LinearConfig(ScheduleBase):
    kind: Literal["linear"]
    """Linear warm-up, then linear to the end."""
    final: Fraction
    """Factor at the end of the budget."""


class ConstantConfig(ScheduleBase):
    kind: Literal["constant"]
    """Linear warm-up, then the peak to the end."""


class TrapezoidConfig(ScheduleBase):
    kind: Literal["trapezoid"]
    """Linear warm-up, the peak, and a decay over the last part of the budget (arXiv:2405.18392)."""
    decay: Fraction
    """Share of the budget, at its end, spent going down."""
    shape: Literal["linear", "sqrt", "cosine"]
    """Curve of the decay; sqrt is one minus the square root, steepest at first."""
    final: Fraction
    """Factor at the end of the budget."""

    @pydantic.model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.warmup + self.decay > 1:
            raise ValueError(
                f"warmup ({self.warmup:g}) and decay ({self.decay:g}) take more than the whole budget; "
                "lower one so that they sum to at most 1"
            )
        return self


ScheduleConfig = Annotated[
    CosineConfig | CycleConfig | LinearConfig | ConstantConfig | TrapezoidConfig, Field(discriminator="kind")
]


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
