"""What training minimizes, behind one interface: nothing outside of this package asks which objective it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor

from pretune.core.batch import Batch
from pretune.objectives.config import DPOConfig, LanguageModelingConfig, ObjectiveConfig
from pretune.objectives.language_modeling import LanguageModel, NextToken
from pretune.objectives.preference import Preference


class Objective(Protocol):
    """A loss, what it is a mean over, and how a model is measured by it."""

    @property
    def first_loss(self) -> float | None:
        """The loss before the first step, where that is known whatever the model is."""
        ...

    def sums(self, model: LanguageModel, batch: Batch) -> dict[str, Tensor]:
        """Sums over what the batch scores, by name, float32 scalars: `loss`, in nats, is to be minimized."""
        ...

    def count(self, batch: Batch) -> int:
        """What these sums are divided by, once for a whole step."""
        ...

    def score(self, model: LanguageModel, batch: Batch) -> Any:
        """What a model makes of each part of the batch, without gradients."""
        ...

    def metrics(self, score: Callable[[Batch], Any], batches: Iterable[Batch], token_bytes: Tensor) -> dict[str, float]:
        """Figures of a whole set, each part counting once, from what `score` returns; `val/loss` is among them.

        token_bytes [V]: bytes of text that each token id stands for.
        """
        ...


def objective_of(section: ObjectiveConfig) -> Objective:
    """The objective that a configuration asks for."""
    match section:
        case LanguageModelingConfig():
            return NextToken(section)
        case DPOConfig():
            return Preference(section)
