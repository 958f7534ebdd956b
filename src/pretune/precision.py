"""Arithmetic done to the model from outside: autocast and compilation."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Literal

from pretune.config import Section

if TYPE_CHECKING:
    import torch


class PrecisionConfig(Section):
    compute: Literal["float32", "bfloat16"]
    """Type of matrix products and activations; weights and optimizer state stay float32."""
    compile: bool
    """Compile the training step with torch.compile: a slower start, faster steps."""


def autocast(config: PrecisionConfig, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context in which forward passes run on `device`."""
    import torch

    if config.compute == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
