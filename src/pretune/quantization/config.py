"""Quantization, as YAML says it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pretune.core.config import Fraction, Section

Stored = Literal["int4", "int8", "none"]


class NoQuantizationConfig(Section):
    kind: Literal["none"]
    """Weights keep all their bits."""
    needs_adapter: ClassVar[bool] = False
    """Whether weights that are stored so cannot be trained themselves."""


class QloraConfig(Section):
    kind: Literal["qlora_nf4"]
    """Frozen matrices inside the blocks take 4 bits a number (NF4 with quantized scales, arXiv 2305.14314); an adapter
    beside them is trained in full precision."""
    block_size: Annotated[int, Field(ge=2, multiple_of=2)]
    """Neighbouring numbers that share a scale; the size of each matrix is a multiple of it."""
    needs_adapter: ClassVar[bool] = True


class IntegerConfig(Section):
    """Weights that are stored as integers, in any of the ways below."""

    needs_adapter: ClassVar[bool] = False
    group_size: Annotated[int, Field(ge=2)]
    """Neighbouring inputs that share a scale, in what is stored in int4; it divides the inputs of every such layer."""
    embedding: Stored
    """How tables of vectors are stored, value embeddings too: int4 with a scale for each group, int8 with one for each
    row, or as they are. Where the head is the embedding's table, this says how the head is stored."""
    head: Stored
    """The same for a head with a matrix of its own; it has no meaning where the head is the embedding's table."""


class Int8WeightOnlyConfig(IntegerConfig):
    kind: Literal["int8_weight_only"]
    """After training: weights of linear layers in 8 bits, a scale for each row; activations stay as they are."""


class Int4WeightOnlyConfig(IntegerConfig):
    kind: Literal["int4_weight_only"]
    """After training: weights of linear layers in 4 bits, a scale for each group; activations stay as they are."""


class Int8Int4Config(IntegerConfig):
    kind: Literal["int8_int4"]
    """After training: weights of linear layers in 4 bits, a scale for each group, and what goes into these layers in 8
    bits, a scale for each token, found as it comes (8da4w). Phones compute so."""


class QatConfig(IntegerConfig):
    kind: Literal["qat_int8_int4"]
    """Training that rounds weights and activations as int8_int4 will (fake quantization), so that the weights adapt to
    it. The run's checkpoints hold weights with all their bits; it is measured, sampled from and exported rounded."""
    start: Fraction
    """Share of the budget that is trained without rounding: 0.5 rounds in the second half."""


PostTrainingConfig = Int8WeightOnlyConfig | Int4WeightOnlyConfig | Int8Int4Config
"""What is done to a model that has been trained."""

FakeQuantizationConfig = PostTrainingConfig | QatConfig
"""What stores weights as integers."""

QuantizationConfig = Annotated[
    NoQuantizationConfig | QloraConfig | QatConfig | Int8Int4Config | Int4WeightOnlyConfig | Int8WeightOnlyConfig,
    Field(discriminator="kind"),
]


def misfit_of_groups(config: FakeQuantizationConfig, inputs: Mapping[str, int]) -> str | None:
    """What is wrong with group_size for matrices with so many `inputs`, and which sizes would do; None where it fits.

    Matrices are named as model.config.ModelConfig.matrix_inputs names them.
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
    advice = f"the nearest that fit all layers are {' and '.join(map(str, sorted(near)))}" if near else "no size would"
    return (
        f"quantization.group_size ({size}) does not divide the {inputs[misfit]} inputs of the layer {misfit}; {advice}"
    )
