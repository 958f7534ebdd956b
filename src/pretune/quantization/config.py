"""Quantization, as YAML says it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pretune.config import Section


class NoQuantizationConfig(Section):
    kind: Literal["none"]
    """Weights keep all their bits."""


class QloraConfig(Section):
    kind: Literal["qlora_nf4"]
    """Frozen matrices inside the blocks take 4 bits a number (NF4 with quantized scales, arXiv 2305.14314); an adapter
    beside them is trained in full precision."""
    block_size: Annotated[int, Field(ge=2, multiple_of=2)]
    """Neighbouring numbers that share a scale; the size of each matrix is a multiple of it."""


QuantizationConfig = Annotated[NoQuantizationConfig | QloraConfig, Field(discriminator="kind")]
