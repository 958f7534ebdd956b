"""Optimizer, schedule and budget, as YAML says them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

from pretune.core.config import Count, Fraction, Seconds, Section

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerBase(Section):
    lr: Positive
    """Peak learning rate; the schedule multiplies it, and every other learning rate of the section."""
    weight_decay: NotNegative
    """Decoupled decay, on matrices only (never on norms, biases or scalars)."""
    weight_decay_final: Fraction
    """Factor on every weight decay at the end of the budget, approached in a straight line; 1 keeps them as they are.
    (What is taken off a weight is also proportional to the learning rate, and so follows the schedule anyway.)"""
    clip_norm: Positive | None
    """Gradients with a larger global norm are scaled down to it; null never clips."""


class AdamWConfig(OptimizerBase):
    kind: Literal["adamw"]
    """AdamW (arXiv:1711.05101), fused."""
    betas: tuple[Beta, Beta]
    """Decay of the running mean and of the running square of the gradient."""
    eps: Positive
    """Added to the root of the running square."""


class AdamW8bitConfig(OptimizerBase):
    kind: Literal["adamw_8bit"]
    """AdamW with its two running means in 8 bits (arXiv:2110.02861), by torchao: 2 bytes a parameter instead of 8."""
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
    momentum_initial: Beta
    """Momentum of the very first step (with momentum_warmup = 0 it is never used)."""
    momentum_warmup: Fraction
    """Share of the budget over which the momentum goes, in a straight line, from momentum_initial to momentum."""
    nesterov: bool
    """Look one momentum step ahead."""
    ns_steps: Annotated[int, Field(ge=1, lt=100)]
    """Newton-Schulz iterations of the orthogonalization."""
    scale: Literal["original", "match_rms_adamw"]
    """How a matrix' shape scales its learning rate: sqrt(max(1, rows / columns)), or 0.2 sqrt(max(rows, columns)),
    which suits learning rates tuned for AdamW (arXiv:2502.16982)."""
    neuron_beta: Beta | None
    """NorMuon (arXiv:2510.05491): rows of the orthogonalized update are divided by the root of their running mean
    square, which decays with this; the update keeps its norm. null leaves them alone."""
    cautious_decay: bool
    """Weight decay only where the update also brings the weight nearer to zero (arXiv:2510.12402)."""
    adamw: MuonAdamWConfig
    """The rest of the parameters."""


OptimizerConfig = Annotated[AdamWConfig | AdamW8bitConfig | LionConfig | MuonConfig, Field(discriminator="kind")]


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


Overhead = Literal["evaluation", "samples", "compilation", "checkpoint"]
"""What a run spends time on besides training."""


class BudgetConfig(Section):
    """Any subset of steps, tokens and time; the first one reached ends the run, and the schedule ends with it."""

    steps: Count | None
    """Optimizer steps."""
    tokens: Count | None
    """Input tokens, over all ranks."""
    time: Seconds | None
    """Time: seconds, or text such as 90s, 5m, 3h. Training counts, and what `count` names."""
    count: tuple[Overhead, ...]
    """What else counts as time spent: any of evaluation, samples, compilation, checkpoint. Each is reported apart,
    counted or not. What is counted is also set aside for the end of the run, as long as it took the last time."""
    replay: str | None
    """Name or folder of a run, or a progress.txt: its steps are taken again, each at the progress and with the tokens
    that it had, whatever the clock says and the limits above; null goes by the clock."""

    @pydantic.model_validator(mode="after")
    def _something(self) -> Self:
        if self.steps is None and self.tokens is None and self.time is None and self.replay is None:
            raise ValueError("a budget of nothing: set at least one of steps, tokens, time")
        return self
