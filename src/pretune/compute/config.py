"""The section that says how a run computes."""

from __future__ import annotations

from typing import Annotated, Literal

from pretune.core.config import MAY_DIFFER, Section

Compute = Literal["float32", "bfloat16", "float16", "float8"]
"""An arithmetic: the type of matrix products."""
Activations = Literal["float32", "bfloat16", "float16"]
"""A type of activations, and of the products that are not in 8 bits."""

OPTIONS: dict[str, str] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float8": "fp8"}
"""What each is called on the command line: precision=bf16."""

FLOAT8_MULTIPLE = 16
"""What the sides of a matrix must be multiples of for a product in 8 bits."""


class PrecisionConfig(Section):
    compute: Annotated[Literal["auto"] | Compute, MAY_DIFFER]
    """Type of matrix products; weights and optimizer state stay float32. auto takes what the device does fast: bfloat16
    where it has instructions for it, else float16 (GPUs) or float32 (CPUs). float16: the loss is scaled, so that small
    gradients survive. float8: products inside the layers in 8 bits (torchao, one scale per tensor), everything else as
    for bfloat16; needs Ada, Hopper or newer."""
    tf32: bool
    """With float32 on NVIDIA GPUs since Ampere: round the factors of matrix products to 10 bits of mantissa
    (TensorFloat-32), eight times as fast on an A100. Elsewhere it changes nothing."""
    compile: Annotated[bool, MAY_DIFFER]
    """Compile the training step with torch.compile: a slower start, faster steps. Without a C++ compiler on the machine
    it stays uncompiled."""
    activation_checkpointing: Annotated[bool, MAY_DIFFER]
    """Keep only what goes into each block for the backward pass, and compute the rest of it a second time: memory for
    larger micro-batches or longer sequences, at the cost of up to a third more arithmetic. Gradients are the same."""

    @property
    def activations(self) -> Activations:
        """Type of activations, and of the products that are not in 8 bits; of a section without `auto`."""
        assert self.compute != "auto", "the device decides first: pretune.run.arithmetic"
        return "bfloat16" if self.compute == "float8" else self.compute
