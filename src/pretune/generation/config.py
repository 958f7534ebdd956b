"""How a text is continued, as YAML says it."""

from __future__ import annotations

from typing import Annotated, Self

import pydantic
from pydantic import Field

from pretune.core.config import Count, Section


class DecodingConfig(Section):
    max_new_tokens: Count
    """Stop after this many tokens, if nothing else ends the text before."""
    temperature: Annotated[float, Field(ge=0)]
    """Logits are divided by it; 0 always takes the likeliest token."""
    top_k: Count | None
    """Sample among the k likeliest tokens; null among all."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None
    """Sample among the fewest tokens whose probabilities sum to this; null among all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None
    """Leave out tokens less probable than this share of the likeliest one's probability; null leaves out none."""
    repetition_penalty: Annotated[float, Field(ge=0.001, le=1000)]
    """Above 1, tokens that stand in the prompt or the text so far become less likely (CTRL, arXiv 1909.05858)."""
    frequency_penalty: Annotated[float, Field(ge=-1000, le=1000)]
    """Taken off a token's logit for each time that it stands in the text so far, the prompt not counted; 0 is off."""
    num_beams: Count
    """Texts that are kept at each step, of which the likeliest is the answer; 1 is no search. Needs temperature 0."""
    length_penalty: Annotated[float, Field(ge=-10, le=10)]
    """A beam's log-probability is divided by its length to this power: above 0 favours long texts."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...]
    """A text ends before the first of these strings."""
    end_tokens: tuple[Annotated[str, Field(min_length=1)], ...]
    """Tokens that end a text besides the tokenizer's end-of-document token, such as <|im_end|>."""
    seed: int
    """Same seed, same text."""

    @pydantic.model_validator(mode="after")
    def _beams_are_not_sampled(self) -> Self:
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError(f"num_beams = {self.num_beams} looks for the likeliest text: set temperature to 0")
        if self.num_beams > 1 and self.stop:
            raise ValueError(f"num_beams = {self.num_beams} compares whole texts: set stop to [], or num_beams to 1")
        return self

    @property
    def penalizes(self) -> bool:
        """Whether what a text holds already changes what comes next."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0
