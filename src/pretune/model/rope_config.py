"""Configuration of rotary positions, and how they are stretched to more positions than a model was trained with."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

from pretune.core.config import Count, Section

Factor = Annotated[float, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


class LinearScaling(Section):
    """Positions are divided by a factor (arXiv:2306.15595)."""

    kind: Literal["linear"]
    """Divides every position."""
    factor: Factor
    """Number to divide positions by."""


class NtkScaling(Section):
    """Theta grows so that the slowest frequency is divided by a factor, and the fastest is kept."""

    kind: Literal["ntk"]
    """Raises theta once, whatever the length: theta * factor^(R / (R - 2)) for R rotated components."""
    factor: Factor
    """Number to divide the slowest frequency by."""

    def raised(self, theta: float, rotated: int) -> float:
        """The theta to use in place of `theta` for that many rotated components."""
        return theta * self.factor ** (rotated / (rotated - 2))


class DynamicScaling(Section):
    """The same, with a theta that grows with the length that is read; up to the original length nothing changes."""

    kind: Literal["dynamic"]
    """Raises theta with the length n of a text, by ((factor * n / original) - (factor - 1))^(R / (R - 2)). While a text
    is generated, keys in the cache keep the rotation of the length at which they were read (as in transformers)."""
    factor: Factor
    """How fast theta grows: at `factor` times the original length, it is what ntk has for factor^2 - factor + 1."""
    original_max_position_embeddings: Count
    """Positions that the model was pretrained with, before it was stretched."""


class YarnScaling(Section):
    """Slow frequencies are divided by a factor, fast ones kept, those between interpolated by their index, and
    attention is sharpened (YaRN, arXiv:2309.00071)."""

    kind: Literal["yarn"]
    """Divides slow frequencies, and scales rotated queries and keys by an attention factor."""
    factor: Factor
    """Number to divide slow frequencies by."""
    original_max_position_embeddings: Count
    """Positions that the model was pretrained with, before it was stretched."""
    attention_factor: Positive | None
    """Factor on rotated queries and on rotated keys; null: 0.1 ln(factor) + 1, or what mscale makes of it."""
    beta_fast: Positive
    """Frequencies that turn more often than this over the original length are kept (32 in the paper)."""
    beta_slow: Positive
    """Frequencies that turn less often than this over the original length are divided (1 in the paper)."""
    mscale: Positive | None
    """With mscale_all_dim, the attention factor is (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1)
    (DeepSeek); null: see attention_factor."""
    mscale_all_dim: Positive | None
    """See mscale."""
    truncate: bool
    """Whether the first and the last of the interpolated frequencies are rounded outwards to a whole index."""

    @pydantic.model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast ({self.beta_fast:g}) must exceed beta_slow ({self.beta_slow:g})")
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError("mscale and mscale_all_dim count only together: set both, or both to null")
        if self.mscale is not None and self.attention_factor is not None:
            raise ValueError("attention_factor replaces what mscale and mscale_all_dim give: set these to null, or it")
        return self


class LongropeScaling(Section):
    """Each frequency is divided by a factor of its own: one for texts up to the original length, another for longer
    ones (LongRoPE, arXiv:2402.13753, as in Phi-3)."""

    kind: Literal["longrope"]
    """Divides each frequency by its own factor. A text that is generated beyond the original length is read anew at
    that point, because all of its keys and values change."""
    short_factor: tuple[Positive, ...]
    """Factors for texts up to the original length, one per frequency (half the rotated components), fastest first."""
    long_factor: tuple[Positive, ...]
    """Factors for longer texts."""
    original_max_position_embeddings: Count
    """Positions that the model was pretrained with, before it was stretched."""
    attention_factor: Positive
    """Factor on rotated queries and on rotated keys, at every length; sqrt(1 + ln(stretch) / ln(original)) in Phi-3."""


class Llama3Scaling(Section):
    """Slow frequencies are divided by a factor, fast ones kept, those between interpolated (Llama 3.1)."""

    kind: Literal["llama3"]
    """Divides slow frequencies only."""
    factor: Factor
    """Number to divide slow frequencies by."""
    low_freq_factor: Positive
    """Frequencies that turn less often than this over the original length are slow."""
    high_freq_factor: Positive
    """Frequencies that turn more often than this over the original length are fast."""
    original_max_position_embeddings: Count
    """Positions that the model was pretrained with, before it was stretched."""

    @pydantic.model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor ({self.high_freq_factor:g}) must exceed low_freq_factor ({self.low_freq_factor:g})"
            )
        return self


RopeScaling = Annotated[
    LinearScaling | NtkScaling | DynamicScaling | YarnScaling | LongropeScaling | Llama3Scaling,
    Field(discriminator="kind"),
]


class RopeConfig(Section):
    theta: Annotated[float, Field(gt=1)]
    """Base of the rotary frequencies."""
    local_theta: Annotated[float, Field(gt=1)] | None
    """Base in the layers that have a window, which are then not stretched (Gemma 3); null: the same as elsewhere."""
    fraction: Annotated[float, Field(ge=0, le=1)]
    """Fraction of each head that is rotated; 0 turns rotary positions off."""
    scaling: RopeScaling | None
    """How the frequencies are stretched to more positions than the model was pretrained with; null: not at all. A run
    may be evaluated, and fine-tuned by stage.init_from, with another one than it was trained with."""
    pattern: Annotated[str, Field(pattern="^[RN]+$")]
    """Pattern of layers with rotary positions (R) and with none (N), repeated over the depth (RRRN in SmolLM3)."""

    def rotated(self, head_dim: int) -> int:
        """The number of components of a head of that width that are rotated; an even number."""
        return int(head_dim * self.fraction) // 2 * 2

    def misfit(self, head_dim: int) -> str | None:
        """Why heads of that width cannot be stretched as `scaling` says; None if they can."""
        rotated, scaling = self.rotated(head_dim), self.scaling
        if scaling is not None and not rotated:
            return (
                "rope.scaling stretches rotary positions, which this model has not (rope.fraction = 0, as in GPT-2): "
                "set it to null"
            )
        if isinstance(scaling, NtkScaling | DynamicScaling) and rotated < 4:
            return f"rope.scaling.kind = {scaling.kind} needs at least 4 rotated components, but heads have {rotated}"
        if isinstance(scaling, LongropeScaling):
            for key in ("short_factor", "long_factor"):
                if (count := len(getattr(scaling, key))) != rotated // 2:
                    return (
                        f"rope.scaling.{key} has {count} numbers, but heads with {rotated} rotated components have "
                        f"{rotated // 2} frequencies: give one for each"
                    )
        return None

    @property
    def follows_length(self) -> bool:
        """Whether the rotation of a position depends on how long its text is."""
        return isinstance(self.scaling, DynamicScaling | LongropeScaling)
