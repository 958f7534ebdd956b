"""Apply a precision to the model: autocast, TensorFloat-32, and 8-bit matrix products."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from pretune.compute.config import FLOAT8_MULTIPLE, Activations, PrecisionConfig
from pretune.core.config import ConfigError
from pretune.core.named_tensors import is_in_block

if TYPE_CHECKING:
    import torch
    from torch import nn


def dtype_of(activations: Activations) -> torch.dtype:
    """The torch dtype with that name."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[activations]


def autocast(config: PrecisionConfig, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The autocast context for forward passes on `device`."""
    import torch

    if config.activations == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype_of(config.activations))


def set_tf32(config: PrecisionConfig, device: torch.device) -> None:
    """Turn TensorFloat-32 for float32 products on CUDA on or off, for the whole process."""
    import torch

    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")


def check_float8(config: PrecisionConfig, device: torch.device, instead: str) -> None:
    """Raise ConfigError if the run wants 8-bit matrix products but `device` does not support them; the message suggests
    `instead` (fp32, bf16...)."""
    import torch

    if config.compute != "float8" or config.emulate:
        return
    name = f"this machine's {device.type}"
    if device.type == "cuda" and torch.version.hip is not None:
        # AMD numbers its devices differently: an MI200 also reports 9.0.
        name = torch.cuda.get_device_name(device)
        if torch.cuda.get_device_properties(device).gcnArchName.startswith(("gfx94", "gfx95", "gfx12")):
            return
    elif device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) >= (8, 9):
            return
        name = f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
    raise ConfigError(
        f"precision=fp8: {name} has no 8-bit matrix products; they need an NVIDIA GPU of compute capability 8.9 or "
        f"newer (Ada, Hopper, Blackwell), or AMD's MI300. Use precision={instead}, or precision.emulate=true to see "
        "what rounding to 8 bits does to a small model, slowly"
    )


def use_float8(model: nn.Module, emulate: bool = False) -> None:
    """Make the linear layers inside the blocks of `model` multiply in 8 bits, forward and backward.

    Weights keep their names, values and dtype. Layers whose dimensions are not multiples of 16 are left unchanged;
    ConfigError if that is all of them. `emulate` rounds like the hardware but multiplies in float32, on any device.
    Source: torchao's dynamic scaling, one scale per tensor (arXiv 2209.05433 for the formats).
    """
    from torch import nn
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def fits(module: nn.Module, name: str) -> bool:
        sides = (module.in_features, module.out_features) if isinstance(module, nn.Linear) else ()
        return is_in_block(name) and all(side % FLOAT8_MULTIPLE == 0 for side in sides)

    if not any(isinstance(module, nn.Linear) and fits(module, name) for name, module in model.named_modules()):
        raise ConfigError(
            f"precision=fp8: no layer of the model has dimensions that are multiples of {FLOAT8_MULTIPLE}; change "
            "model.dim and model.mlp_dim, or use precision=bf16"
        )
    convert_to_float8_training(model, module_filter_fn=fits, config=Float8LinearConfig(emulate=emulate))
