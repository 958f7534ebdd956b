"""Configuration of quantization."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pretune.core.config import Fraction, Section

Stored = Literal["int4", "int8", "none"]


class NoQuantizationConfig(Section):
    kind: Literal["none"]
    """No quantization."""
    needs_adapter: ClassVar[bool] = False
    """Whether quantized weights cannot be trained, so that an adapter is needed."""


class QloraConfig(Section):
    kind: Literal["qlora_nf4"]
    """QLoRA: frozen matrices inside the blocks have 4 bits per weight (NF4 with double quantization, arXiv 2305.14314);
    an adapter is trained in full precision."""
    block_size: Annotated[int, Field(ge=2, multiple_of=2)]
    """Number of adjacent weights that share a scale; it must divide the size of each matrix."""
    needs_adapter: ClassVar[bool] = True


class IntegerConfig(Section):
    """Base of the sections that store weights as integers."""

    needs_adapter: ClassVar[bool] = False
    group_size: Annotated[int, Field(ge=2)]
    """Number of adjacent inputs that share a scale in int4 weights; it must divide the inputs of every such layer."""
    embedding: Stored
    """How embedding tables, including value embeddings, are stored: int4 with a scale per group, int8 with a scale per
    row, or none for no quantization. This also applies to a tied head."""
    head: Stored
    """The same for an untied head; ignored for a tied head."""


class Int8WeightOnlyConfig(IntegerConfig):
    kind: Literal["int8_weight_only"]
    """Post-training: 8-bit weights in linear layers, one scale per row; activations are not quantized."""


class Int4WeightOnlyConfig(IntegerConfig):
    kind: Literal["int4_weight_only"]
    """Post-training: 4-bit weights in linear layers, one scale per group; activations are not quantized."""


class Int8Int4Config(IntegerConfig):
    kind: Literal["int8_int4"]
    """Post-training: 4-bit weights in linear layers, one scale per group, and 8-bit inputs with a dynamic scale per
    token (8da4w), as used on phones."""


class QatConfig(IntegerConfig):
    kind: Literal["qat_int8_int4"]
    """Quantization-aware training: fake quantization rounds weights and activations as int8_int4 does, so that the
    weights adapt to it. Checkpoints hold unrounded weights; evaluation, samples and exports use rounded ones."""
    start: Fraction
    """Fraction of the budget before fake quantization starts: 0.5 rounds in the second half."""


PostTrainingConfig = Int8WeightOnlyConfig | Int4WeightOnlyConfig | Int8Int4Config
"""Sections for post-training quantization."""

FakeQuantizationConfig = PostTrainingConfig | QatConfig
"""Sections that store weights as integers."""

QuantizationConfig = Annotated[
    NoQuantizationConfig | QloraConfig | QatConfig | Int8Int4Config | Int4WeightOnlyConfig | Int8WeightOnlyConfig,
    Field(discriminator="kind"),
]


def misfit_of_groups(config: FakeQuantizationConfig, inputs: Mapping[str, int]) -> str | None:
    """Why group_size does not fit matrices with these `inputs`, and which sizes would; None if it fits.

    Matrices are named as in model.config.ModelConfig.matrix_inputs.
    """

    def grouped(name: str) -> bool:
        if "embedding" in name:
            return config.embedding == "int4"
        return config.head == "int4" if name == "head" else config.kind != "int8_weight_only"

    size, inputs = config.group_size, {name: width for name, width in inputs.items() if grouped(name)}
    misfit = next((name for name, width in inputs.items() if width % size), None)
    if misfit is None:
        return None
    common = math.gcd(*inputs.values())
    fits = [width for width in range(2, common + 1) if common % width == 0]
    near = {*[width for width in fits if width < size][-1:], *[width for width in fits if width > size][:1]}
    advice = f"the nearest that fit all layers are {' and '.join(map(str, sorted(near)))}" if near else "no size does"
    return (
        f"quantization.group_size ({size}) does not divide the {inputs[misfit]} inputs of the layer {misfit}; {advice}"
    )
