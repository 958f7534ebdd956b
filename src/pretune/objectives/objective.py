"""The interface of training objectives: no code outside this package needs to know which objective it has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, assert_never

from torch import Tensor

from pretune.core.batch import Batch
from pretune.objectives.config import DistillationConfig, DPOConfig, LanguageModelingConfig, ObjectiveConfig
from pretune.objectives.distillation import Distillation, teacher_outputs
from pretune.objectives.language_modeling import Compile, LanguageModel, NextToken
from pretune.objectives.preference import Preference, reference_outputs


class Objective(Protocol):
    """A loss, the number of items that it is averaged over, and the metrics for evaluation."""

    @property
    def first_loss(self) -> float | None:
        """The loss before the first step, if it is the same for every model; else None."""
        ...

    def sums(self, model: LanguageModel, batch: Batch) -> dict[str, Tensor]:
        """Sums over the scored items (tokens or pairs) of the batch, by name: float32 scalars. `loss`, in nats, is
        minimized."""
        ...

    def count(self, batch: Batch) -> int:
        """The number of scored items; the sums of a whole step are divided by its total, once."""
        ...

    def scorer(self, compiled: Compile | None = None) -> Callable[[LanguageModel, Batch], Any]:
        """A function that scores each item of a batch, to be called without gradients; `compiled` compiles it."""
        ...

    def metrics(self, score: Callable[[Batch], Any], batches: Iterable[Batch], token_bytes: Tensor) -> dict[str, float]:
        """Metrics over a whole set, computed from what `score` returns, each item counting once; `val/loss` and
        `val/bits_per_byte` are among them.

        token_bytes [V]: the number of bytes of text of each token id.
        """
        ...


def objective_of(section: ObjectiveConfig, frozen: LanguageModel | None = None) -> Objective:
    """The objective for a configuration. `frozen`: the frozen model, if one is in memory; only losses and scores need
    it."""
    match section:
        case LanguageModelingConfig():
            return NextToken(section)
        case DPOConfig():
            return Preference(section)
        case DistillationConfig():
            return Distillation(section, frozen)
        case _:
            assert_never(section)


def frozen_outputs(
    section: ObjectiveConfig, vocab_size: int, compiled: Compile | None = None
) -> Callable[[LanguageModel, Batch], dict[str, Tensor]]:
    """A function that asks a frozen model what the objective wants to know of it: Batch.reference. It is to be called
    without gradients; `vocab_size` is that of the model in training, and `compiled` compiles it."""
    match section:
        case DPOConfig():
            return reference_outputs(section, compiled)
        case DistillationConfig():
            return teacher_outputs(section, vocab_size, compiled)
        case LanguageModelingConfig():
            raise AssertionError("it asks no other model")
        case _:
            assert_never(section)
