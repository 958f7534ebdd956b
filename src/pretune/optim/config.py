"""Configuration of optimizer, schedule and budget."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

import pydantic
from pydantic import Field

from pretune.core.config import Count, FilePath, Fraction, Seconds, Section

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerBase(Section):
    compiles_update: ClassVar[bool] = False
    """Whether the optimizer compiles its own update."""
    lr: Positive
    """Peak learning rate; the schedule scales it and every other learning rate in the section."""
    weight_decay: NotNegative
    """Decoupled weight decay, on matrices only (never on norms, biases or scalars)."""
    weight_decay_final: Fraction
    """Factor on every weight decay at the end of the budget, reached linearly; 1 keeps weight decay constant.
    (The decay of a weight is also proportional to the learning rate, so it follows the schedule anyway.)"""
    clip_norm: Positive | None
    """Gradients with a larger global norm are scaled down to this norm; null never clips."""


class AdamWConfig(OptimizerBase):
    kind: Literal["adamw"]
    """AdamW (arXiv:1711.05101), fused."""
    betas: tuple[Beta, Beta]
    """Decay rates of the running mean of the gradient and of its square."""
    eps: Positive
    """Added to the root of the running mean square."""


class AdamW8bitConfig(OptimizerBase):
    kind: Literal["adamw_8bit"]
    """torchao's AdamW with 8-bit state (arXiv:2110.02861): 2 bytes per parameter instead of 8."""
    compiles_update = True
    betas: tuple[Beta, Beta]
    """Decay rates of the running mean of the gradient and of its square."""
    eps: Positive
    """Added to the root of the running mean square."""


class LionConfig(OptimizerBase):
    kind: Literal["lion"]
    """lion-pytorch's Lion (arXiv:2302.06675); it needs a learning rate 3 to 10 times smaller than AdamW's."""
    betas: tuple[Beta, Beta]
    """Interpolation factor of the update, and decay rate of the momentum."""


class MuonAdamWConfig(Section):
    """AdamW for parameters that Muon does not handle: embeddings, head, norms, biases and scalars."""

    embedding_lr: Positive
    """Peak learning rate of embedding tables (and of a tied head)."""
    head_lr: Positive
    """Peak learning rate of an untied output head, and of any other matrix outside the layers."""
    scalar_lr: Positive
    """Peak learning rate of norms, biases and scalars."""
    betas: tuple[Beta, Beta]
    """Decay rates of the running mean of the gradient and of its square."""
    eps: Positive
    """Added to the root of the running mean square."""
    weight_decay: NotNegative
    """Decoupled weight decay of embeddings and head."""


class MuonConfig(OptimizerBase):
    kind: Literal["muon"]
    """Muon (kellerjordan.github.io/posts/muon) for the matrices inside the layers, AdamW for everything else."""
    momentum: Beta
    """Decay rate of the gradient's running mean, which is then orthogonalized."""
    momentum_initial: Beta
    """Momentum at the start (unused with momentum_warmup = 0)."""
    momentum_warmup: Fraction
    """Fraction of the budget over which the momentum changes linearly from momentum_initial to momentum."""
    nesterov: bool
    """Use Nesterov momentum."""
    ns_steps: Annotated[int, Field(ge=1, lt=100)]
    """Number of Newton-Schulz iterations for the orthogonalization."""
    scale: Literal["original", "match_rms_adamw"]
    """How a matrix's shape scales its learning rate: original is sqrt(max(1, rows / columns)); match_rms_adamw is
    0.2 sqrt(max(rows, columns)), which suits learning rates tuned for AdamW (arXiv:2502.16982)."""
    neuron_beta: Beta | None
    """NorMuon (arXiv:2510.05491): each row of the orthogonalized update is divided by the root of its running mean
    square, which has this decay rate; the norm of the update is kept. null is plain Muon."""
    cautious_decay: bool
    """Apply weight decay only where the update also moves the weight towards zero (arXiv:2510.12402)."""
    adamw: MuonAdamWConfig
    """AdamW for the remaining parameters."""


OptimizerConfig = Annotated[AdamWConfig | AdamW8bitConfig | LionConfig | MuonConfig, Field(discriminator="kind")]


class ScheduleBase(Section):
    warmup: Fraction
    """Fraction of the budget for the warm-up to the peak."""
    initial: Fraction
    """Factor on the peak learning rate from which the warm-up starts (unused with warmup = 0). The first step is
    already a step above it, so that none is lost at 0."""


class CosineConfig(ScheduleBase):
    kind: Literal["cosine"]
    """Linear warm-up, then cosine decay."""
    final: Fraction
    """Factor at the end of the budget."""


class CycleConfig(ScheduleBase):
    kind: Literal["cycle"]
    """One cycle (arXiv:1708.07120): half a cosine up, half a cosine down; momentum stays constant."""
    final: Fraction
    """Factor at the end of the budget."""


class LinearConfig(ScheduleBase):
    kind: Literal["linear"]
    """Linear warm-up, then linear decay."""
    final: Fraction
    """Factor at the end of the budget."""


class ConstantConfig(ScheduleBase):
    kind: Literal["constant"]
    """Linear warm-up, then constant at the peak."""


class TrapezoidConfig(ScheduleBase):
    kind: Literal["trapezoid"]
    """Linear warm-up, constant at the peak, and decay over the last part of the budget (arXiv:2405.18392)."""
    decay: Fraction
    """Fraction of the budget, at its end, for the decay."""
    shape: Literal["linear", "sqrt", "cosine"]
    """Shape of the decay; sqrt is one minus the square root, steepest at first."""
    final: Fraction
    """Factor at the end of the budget."""

    @pydantic.model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.warmup + self.decay > 1:
            raise ValueError(
                f"warmup ({self.warmup:g}) and decay ({self.decay:g}) take more than the whole budget; "
                "lower one of them so that they sum to at most 1"
            )
        return self


ScheduleConfig = Annotated[
    CosineConfig | CycleConfig | LinearConfig | ConstantConfig | TrapezoidConfig, Field(discriminator="kind")
]


Overhead = Literal["evaluation", "samples", "compilation", "checkpoint"]
"""What a run spends time on besides training."""


class BudgetConfig(Section):
    """Any subset of steps, tokens and time; the first limit reached ends the run, and the schedule with it."""

    steps: Count | None
    """Optimizer steps."""
    tokens: Count | None
    """Input tokens, over all ranks."""
    time: Seconds | None
    """Time limit: seconds, or text such as 90s, 5m, 3h. It covers training and whatever `count` lists."""
    count: tuple[Overhead, ...]
    """What else counts as time spent: any of evaluation, samples, compilation, checkpoint. Each is reported separately,
    counted or not. Time for counted work at the end of the run is reserved, as long as it took the last time."""
    replay: FilePath | None
    """Name or folder of a run, or a progress.txt: repeat its steps, each with the same progress and number of tokens,
    ignoring the clock and the limits above; null follows the limits."""

    @pydantic.model_validator(mode="after")
    def _something(self) -> Self:
        if self.steps is None and self.tokens is None and self.time is None and self.replay is None:
            raise ValueError("the budget is empty: set at least one of steps, tokens, time")
        return self
