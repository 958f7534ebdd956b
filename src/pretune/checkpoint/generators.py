"""The states of torch's random generators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def generator_states(model: nn.Module) -> dict[str, Tensor]:
    """The states of torch's random generators for the CPU and for `model`'s device, as uint8 tensors."""
    import torch

    device = _device(model)
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def set_generator_states(model: nn.Module, random: Mapping[str, Tensor]) -> None:
    """Restore torch's random generators to what `generator_states` returned; states of other devices are ignored."""
    import torch

    device = _device(model)
    torch.set_rng_state(random["cpu"])
    if device.type != "cpu" and device.type in random:
        torch.get_device_module(device).set_rng_state(random[device.type])


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
