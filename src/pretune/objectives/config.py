"""Configuration of the training objective."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pretune.core.config import MAY_DIFFER, Count, Section


class ObjectiveBase(Section):
    chunk_tokens: Annotated[Count, MAY_DIFFER]
    """Number of positions whose float32 logits are in memory at a time; fewer saves memory, too few costs speed. Of the
    results, it affects only the last bits."""
    compares_pairs: ClassVar[bool] = False
    """Whether an item is a pair of answers to one prompt, not a token."""

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the model with a reference model."""
        return isinstance(self, ReferenceBase)


Reference = Literal["auto", "model", "adapter_off", "cached"]


class ReferenceBase(ObjectiveBase):
    """An objective that compares the model with a reference model: the model at the start."""

    reference: Reference
    """The reference model. model: a second, frozen copy of the initial model; adapter_off: the model with its adapter
    disabled, no copy; cached: log-probabilities computed once for all pairs and stored on disk, no copy and less
    computation; auto: adapter_off where that equals the initial model, else model."""


class LanguageModelingConfig(ObjectiveBase):
    kind: Literal["language_modeling"]
    """Next-token cross-entropy."""


class DPOConfig(ReferenceBase):
    kind: Literal["dpo"]
    """Direct preference optimization (arXiv 2305.18290): learn to prefer the chosen side of a pair to the rejected one
    more strongly than the reference model (the model at the start) does."""
    beta: Annotated[float, Field(gt=0)]
    """Penalty for departing from the reference model: a reward is beta times the log-probability gained over it. With
    length_normalized, where rewards are per token, 2 to 10 is usual."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)]
    """Assumed fraction of pairs whose labels are swapped (cDPO)."""
    length_normalized: bool
    """Divide the log-probability of a side by its number of scored tokens (arXiv 2411.15124, section 5)."""
    compares_pairs = True


ObjectiveConfig = Annotated[LanguageModelingConfig | DPOConfig, Field(discriminator="kind")]
