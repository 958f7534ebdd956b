"""Configuration of precision, compilation and activation checkpointing."""

from __future__ import annotations

from typing import Annotated, Literal

from pretune.core.config import MAY_DIFFER, Section

Compute = Literal["float32", "bfloat16", "float16", "float8"]
"""A precision: the dtype of matrix products."""
Activations = Literal["float32", "bfloat16", "float16"]
"""A dtype of activations, and of matrix products that are not in 8 bits."""

OPTIONS: dict[str, str] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float8": "fp8"}
"""The name of each on the command line, as in precision=bf16."""

FLOAT8_MULTIPLE = 16
"""Both dimensions of a matrix must be multiples of this for 8-bit products."""


class PrecisionConfig(Section):
    compute: Annotated[Literal["auto"] | Compute, MAY_DIFFER]
    """Dtype of matrix products; weights and optimizer state stay float32. auto takes what is fast on the device:
    bfloat16 if it has instructions for it, else float16 (GPUs) or float32 (CPUs). float16 uses loss scaling, so that
    small gradients do not underflow. float8: 8-bit products inside the layers (torchao, one scale per tensor),
    everything else as for bfloat16; needs Ada, Hopper or newer."""
    emulate: Annotated[bool, MAY_DIFFER]
    """With float8: round like hardware with 8-bit products, but multiply in float32. Runs on any device, slower than
    without; to try on a small model whether it still learns."""
    tf32: Annotated[bool, MAY_DIFFER]
    """With float32 on NVIDIA GPUs since Ampere: round the inputs of matrix products to 10 bits of mantissa
    (TensorFloat-32), eight times as fast on an A100. It has no effect elsewhere."""
    compile: Annotated[bool, MAY_DIFFER]
    """Compile the training step with torch.compile: a slower start, but faster steps. The step is not compiled on
    Apple's GPU, on NVIDIA GPUs before compute capability 7.0, or without a C++ compiler on the machine."""
    activation_checkpointing: Annotated[bool, MAY_DIFFER]
    """Keep only the inputs of each block for the backward pass and recompute the rest: frees memory for larger
    micro-batches or longer sequences, at the cost of up to a third more computation. Gradients are the same."""

    @property
    def activations(self) -> Activations:
        """Dtype of activations, and of matrix products that are not in 8 bits; `compute` must not be auto."""
        assert self.compute != "auto", "the device decides first: pretune.run.precision"
        return "bfloat16" if self.compute == "float8" else self.compute
