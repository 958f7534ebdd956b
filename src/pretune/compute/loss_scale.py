"""Dynamic loss scaling: float16 has no small numbers, so a loss is multiplied before its backward pass, and gradients
are divided afterwards (arXiv 1710.03740).

The factor doubles after 2,000 steps without an overflow and halves at each, as torch.amp.GradScaler's does. It is a
power of two throughout, so that multiplying and dividing are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

INITIAL, LEAST, MOST = 2.0**16, 1.0, 2.0**24
INTERVAL = 2000
"""Steps without an overflow after which the factor doubles."""


@dataclass
class LossScale:
    """What a run's loss is multiplied by; `factor` is None, and stays so, for types other than float16."""

    factor: float | None
    steps: int = 0
    """Since the factor last changed."""
    overflows: int = 0
    """How often gradients were too large, and the step was done again."""

    @classmethod
    def of(cls, activations: str) -> LossScale:
        """What activations of that type need."""
        return cls(INITIAL if activations == "float16" else None)

    def for_activations(self, activations: str) -> LossScale:
        """It, or a new one where activations of that type need another kind."""
        return self if (self.factor is None) == (activations != "float16") else LossScale.of(activations)

    @property
    def value(self) -> float:
        return 1.0 if self.factor is None else self.factor

    def metrics(self) -> dict[str, float]:
        """What is reported of it: nothing where there is none."""
        return {} if self.factor is None else {"train/loss_scale": self.factor, "train/overflows": self.overflows}

    def lower(self) -> bool:
        """Halve the factor after an overflow; False where that is no use, because it is as small as it gets or 1."""
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
