"""Save and load an optimizer's state, and the random generators' states, as named tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretune.checkpoint.shards import SHARDS, read_shards, stored_tensors
from pretune.checkpoint.tensors import packed, plain_name, read_tensors, unpacked
from pretune.core.config import InputError
from pretune.core.named_tensors import is_shared_out, shared_out

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_RANDOM = "random:"
OF_OPTIMIZER = "optimizer:"
"""Before the names of an optimizer's tensors in shards."""


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and the file's header: the optimizer's class and its parameters."""
    names = _parameter_names(model, optimizer)
    tensors: dict[str, Tensor] = {}
    for parameter, slots in optimizer.state.items():
        for slot, value in slots.items():
            tensors |= packed(f"{names[parameter]}.{slot}", value)
    return tensors, {"optimizer": type(optimizer).__name__, "parameters": json.dumps(list(names.values()))}


def random_tensors(random: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The states of random generators, by their names in the file."""
    return {_RANDOM + device: state for device, state in random.items()}


def load_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Restore an optimizer, from `path` or, where processes shared its state out, from the shards beside it; return the
    random generators' states that were stored with it.

    Raises InputError for the state of another optimizer or of other parameters.
    """
    names = _parameter_names(model, optimizer)
    stored, header = read_tensors(path)
    random = {name.removeprefix(_RANDOM): stored.pop(name) for name in list(stored) if name.startswith(_RANDOM)}
    if (path.parent / SHARDS).is_dir():
        stored = _from_shards(path.parent, {name: parameter for parameter, name in names.items()})
    slots = _by_parameter(path, stored, names, header, type(optimizer).__name__)
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = {}
            for slot, value in slots[names[parameter]].items():
                # Step counters are scalars on the host, except where a fused or capturable kernel needs them on the
                # device.
                on_device = value.ndim > 0 or group.get("fused") or group.get("capturable")
                # Copied, because the loaded tensor is a view of the file, which may be deleted during the run.
                value = shared_out(value, parameter) if value.ndim and not is_shared_out(value) else value
                state[slot] = value.to(parameter.device if on_device else "cpu", copy=True)
            if state:
                optimizer.state[parameter].update(unpacked(state, parameter))
    return random


def _from_shards(folder: Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint's shards hold of the optimizer's state: of parameters that are shared out, this process's
    part."""
    import torch

    found = stored_tensors(folder, OF_OPTIMIZER)
    tensors = {}
    for name, one in found.items():
        parameter: Any = parameters.get(name.rpartition(".")[0])
        if one.shape and is_shared_out(parameter):
            from torch.distributed.tensor import empty

            mesh, placements = parameter.device_mesh, parameter.placements
            tensors[name] = empty(one.shape, dtype=one.dtype, device_mesh=mesh, placements=placements)
        else:
            tensors[name] = torch.empty(one.shape, dtype=one.dtype)
    read_shards(folder, OF_OPTIMIZER, tensors)
    return tensors


def _by_parameter(
    path: Path, stored: Mapping[str, Tensor], names: Mapping[Tensor, str], header: Mapping[str, str], kind: str
) -> dict[str, dict[str, Tensor]]:
    """State slots per parameter, after checking that they belong to this optimizer."""
    if header.get("optimizer") != kind:
        raise InputError(f"{path} holds the state of {header.get('optimizer')}, but this run's optimizer is {kind}")
    there, here = set(json.loads(header["parameters"])), set(names.values())
    if there != here:
        first = min(there ^ here)
        side = "is trained now but was not then" if first in here else "was trained then but is not now"
        raise InputError(f"{path} is the optimizer state of other parameters: {first} {side}")
    shapes = {name: parameter.shape for parameter, name in names.items()}
    slots: dict[str, dict[str, Tensor]] = {name: {} for name in shapes}
    for key, value in stored.items():
        name, _, slot = key.rpartition(".")
        if not _fits(slot, value.shape, shapes[name]):
            raise InputError(f"{path} does not fit: {key} is {list(value.shape)}, {name} is {list(shapes[name])}")
        slots[name][slot] = value
    return slots


def _fits(slot: str, stored: torch.Size, shape: torch.Size) -> bool:
    """Whether a slot's shape fits its parameter: a counter, part of 8-bit state, or one value per element, row or
    column."""
    if not stored or ":" in slot:
        return True
    return len(stored) == len(shape) and all(a in (1, b) for a, b in zip(stored, shape, strict=True))


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[Tensor, str]:
    """The model's names of the optimizer's parameters, in the optimizer's order."""
    names = {parameter: plain_name(name) for name, parameter in model.named_parameters()}
    return {parameter: names[parameter] for group in optimizer.param_groups for parameter in group["params"]}
