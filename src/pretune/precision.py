"""Arithmetic done to the model from outside: autocast, and matrix products in 8 bits."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Literal

from pretune.config import ConfigError, Section

if TYPE_CHECKING:
    import torch
    from torch import nn

FLOAT8_MULTIPLE = 16
"""What the sides of a matrix must be multiples of for a product in 8 bits."""


class PrecisionConfig(Section):
    compute: Literal["float32", "bfloat16", "float8"]
    """Type of matrix products; weights and optimizer state stay float32. float8: products inside the layers in 8 bits
    (torchao, one scale per tensor), everything else as for bfloat16; needs Ada, Hopper or newer."""
    compile: bool
    """Compile the training step with torch.compile: a slower start, faster steps."""
    activation_checkpointing: bool
    """Keep only what goes into each block for the backward pass, and compute the rest of it a second time: memory for
    larger micro-batches or longer sequences, at the cost of up to a third more arithmetic. Gradients are the same."""

    @property
    def activations(self) -> Literal["float32", "bfloat16"]:
        """Type of activations, and of the products that are not in 8 bits."""
        return "float32" if self.compute == "float32" else "bfloat16"


def autocast(config: PrecisionConfig, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context in which forward passes run on `device`."""
    import torch

    if config.activations == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def check_arithmetic(config: PrecisionConfig, device: torch.device) -> None:
    """ConfigError where `device` cannot multiply matrices in 8 bits although the run asks for it."""
    import torch

    if config.compute != "float8":
        return
    name = f"this machine's {device.type}"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) >= (8, 9):
            return
        name = f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
    raise ConfigError(
        f"precision=fp8: {name} has no 8-bit matrix products; they need an NVIDIA GPU of compute capability 8.9 or "
        "newer (Ada, Hopper, Blackwell), or AMD's MI300. Take precision=bf16"
    )


def use_float8(model: nn.Module, emulate: bool = False) -> None:
    """Let the linear layers inside the blocks of `model` multiply in 8 bits, forward and backward.

    Weights keep their names, values and type. Layers whose sides are no multiples of 16 stay as they are; ConfigError
    where that is all of them. `emulate` rounds as the hardware does and multiplies in float32, on any device.
    Source: torchao's dynamic scaling, one scale per tensor (arXiv 2209.05433 for the formats).
    """
    from torch import nn
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def fits(module: nn.Module, name: str) -> bool:
        sides = (module.in_features, module.out_features) if isinstance(module, nn.Linear) else ()
        return "layers" in name.split(".") and all(side % FLOAT8_MULTIPLE == 0 for side in sides)

    if not any(isinstance(module, nn.Linear) and fits(module, name) for name, module in model.named_modules()):
        raise ConfigError(
            f"precision=fp8: no layer of the model has sides that are multiples of {FLOAT8_MULTIPLE}; change model.dim "
            "and model.mlp_dim, or take precision=bf16"
        )
    convert_to_float8_training(model, module_filter_fn=fits, config=Float8LinearConfig(emulate=emulate))
