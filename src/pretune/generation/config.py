"""Configuration of text generation."""

from __future__ import annotations

from typing import Annotated, Self

import pydantic
from pydantic import Field

from pretune.core.config import Count, Section


class DecodingConfig(Section):
    max_new_tokens: Count
    """Maximum number of tokens to generate."""
    temperature: Annotated[float, Field(ge=0)]
    """Logits are divided by it; 0 always takes the most likely token."""
    top_k: Count | None
    """Sample from the k most likely tokens; null samples from all."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None
    """Sample from the smallest set of tokens whose probabilities sum to this; null samples from all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None
    """Exclude tokens less likely than this fraction of the most likely token's probability; null excludes none."""
    repetition_penalty: Annotated[float, Field(ge=0.001, le=1000)]
    """Above 1, tokens that occur in the prompt or the text so far become less likely (CTRL, arXiv 1909.05858)."""
    frequency_penalty: Annotated[float, Field(ge=-1000, le=1000)]
    """Subtracted from a token's logit for each occurrence in the text so far, not counting the prompt; 0 is off."""
    num_beams: Count
    """Number of beams of beam search; 1 is no search. Needs temperature 0."""
    length_penalty: Annotated[float, Field(ge=-10, le=10)]
    """A beam's log-probability is divided by its length to this power: above 0 favors long texts."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...]
    """Stop strings: a text ends before the first occurrence of any of them."""
    end_tokens: tuple[Annotated[str, Field(min_length=1)], ...]
    """Tokens that end a text besides the tokenizer's end-of-document token, such as <|im_end|>."""
    seed: int
    """Random seed: the same seed gives the same text."""

    @pydantic.model_validator(mode="after")
    def _beams_are_not_sampled(self) -> Self:
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError(f"num_beams = {self.num_beams} searches for the likeliest text: set temperature to 0")
        if self.num_beams > 1 and self.stop:
            raise ValueError(f"num_beams = {self.num_beams} compares whole texts: set stop to [], or num_beams to 1")
        return self

    @property
    def penalizes(self) -> bool:
        """Whether any penalty is on."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0
