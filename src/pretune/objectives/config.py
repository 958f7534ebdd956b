"""What is minimised, as YAML says it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pretune.core.config import Count, Section


class ObjectiveBase(Section):
    chunk_tokens: Count
    """Positions whose logits are held in float32 at one time; fewer saves memory, too few costs speed."""
    needs_reference: ClassVar[bool]
    """Whether the loss compares the model with another one."""


class LanguageModelingConfig(ObjectiveBase):
    kind: Literal["language_modeling"]
    """Cross-entropy of the next token."""
    needs_reference = False


class DPOConfig(ObjectiveBase):
    kind: Literal["dpo"]
    """Direct preference optimization (arXiv 2305.18290): prefer the chosen side of a pair to the rejected one, by more
    than the reference, the model as it was at the start, does."""
    beta: Annotated[float, Field(gt=0)]
    """How dear it is to depart from the reference: a reward is beta times the log-probability gained. With
    length_normalized, where rewards are those of a token, 2 to 10 is usual."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)]
    """Share of pairs that are taken to be the wrong way round (cDPO)."""
    length_normalized: bool
    """Divide the log-probability of a side by its number of scored tokens (arXiv 2411.15124, section 5)."""
    reference: Literal["auto", "model", "adapter_off", "cached"]
    """model: a second, frozen copy of the start; adapter_off: the model without its adapter, no copy; cached: computed
    once for all pairs and kept on disk, no copy and less to compute; auto: adapter_off where that is the start, else
    model."""
    needs_reference = True


ObjectiveConfig = Annotated[LanguageModelingConfig | DPOConfig, Field(discriminator="kind")]
