"""Dynamic loss scaling: small gradients underflow in float16, so the loss is multiplied by a factor before the backward
pass and the gradients are divided by it afterwards (arXiv 1710.03740).

The factor doubles after 2,000 steps without an overflow and halves at each overflow, as in torch.amp.GradScaler. It is
always a power of two, so that multiplying and dividing are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

INITIAL, LEAST, MOST = 2.0**16, 1.0, 2.0**24
INTERVAL = 2000
"""Steps without an overflow after which the factor doubles."""


@dataclass
class LossScale:
    """The factor on a run's loss; `factor` is always None for dtypes other than float16."""

    factor: float | None
    steps: int = 0
    """Steps since the factor last changed."""
    overflows: int = 0
    """How often gradients overflowed and the step was repeated."""

    @classmethod
    def of(cls, activations: str) -> LossScale:
        """A new loss scale for activations of that dtype."""
        return cls(INITIAL if activations == "float16" else None)

    def for_activations(self, activations: str) -> LossScale:
        """This loss scale, or a new one if that dtype needs scaling and this one does not scale, or vice versa."""
        return self if (self.factor is None) == (activations != "float16") else LossScale.of(activations)

    @property
    def value(self) -> float:
        return 1.0 if self.factor is None else self.factor

    def metrics(self) -> dict[str, float]:
        """Metrics to report; empty without scaling."""
        return {} if self.factor is None else {"train/loss_scale": self.factor, "train/overflows": self.overflows}

    def lower(self) -> bool:
        """Halve the factor after an overflow; False if there is no scaling or the factor is already at its minimum."""
        if self.factor is None or self.factor <= LEAST:
            return False
        self.factor, self.steps, self.overflows = self.factor / 2, 0, self.overflows + 1
        return True

    def step(self) -> None:
        """Count a step whose gradients were finite."""
        if self.factor is None:
            return
        self.steps += 1
        if self.steps >= INTERVAL:
            self.factor, self.steps = min(self.factor * 2, MOST), 0
