"""Read and write safetensors files, name a model's tensors, and convert 8-bit optimizer state to plain tensors and
back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pretune.core.config import InputError
from pretune.core.named_tensors import HasShape, is_shared_out, misfit

if TYPE_CHECKING:
    from torch import Tensor, nn

DAMAGED = "choose another with checkpoint.use, or restore it from a copy; training goes on from the newest whole one"
"""Advice for a checkpoint file that cannot be read."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write tensors and a header; OSError if the file cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt", **header})
    except SafetensorError as error:
        raise OSError(re.sub(r".*I/O error: | \(os error \d+\)", "", str(error))) from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors, onto the CPU, and the header; InputError for a file that cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensors(), file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path} ({error}); {DAMAGED}") from None


def fitting(path: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a weights file; InputError unless names and shapes are those of `own`."""
    stored, _ = read_tensors(path)
    check_fit(path, stored, own)
    return stored


def check_fit(path: Path, stored: Mapping[str, HasShape], own: Mapping[str, Tensor]) -> None:
    """Raise InputError unless names and shapes of what `path` holds are those of `own`."""
    if faults := misfit(stored, own, "is in the file but not in the model"):
        raise InputError(
            f"the weights in {path} do not fit this model: {faults}; "
            "the model section must be that of the run that wrote them"
        )


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; a tensor with several names is listed under its first."""
    named: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            named[plain_name(name)] = tensor
    return named


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters by name."""
    return {plain_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def packed(name: str, value: Tensor) -> dict[str, Tensor]:
    """A tensor of an optimizer's state, or its component tensors if it is torchao's 8-bit state."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if is_shared_out(value) or not is_traceable_wrapper_subclass(value):
        return {name: value}
    return {f"{name}:{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]}


def unpacked(slots: Mapping[str, Tensor], parameter: Tensor) -> dict[str, Tensor]:
    """The state of a parameter, with its 8-bit tensors reassembled."""
    whole = {slot: value for slot, value in slots.items() if ":" not in slot}
    for slot in sorted({slot.partition(":")[0] for slot in slots if ":" in slot}):
        from torchao.optim.subclass_8bit import OptimState8bit

        codes, scale, qmap = (slots[f"{slot}:{part}"] for part in OptimState8bit.tensor_attrs)
        signed = bool(qmap[0] < 0)  # the map of unsigned state begins at 0
        whole[slot] = OptimState8bit(codes, scale, qmap, signed, dtype=parameter.dtype)
    return whole


def plain_name(name: str) -> str:
    """A parameter's name without the prefix that torch.compile adds."""
    return name.replace("_orig_mod.", "")
