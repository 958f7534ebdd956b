"""Tensors in safetensors files, and 8-bit optimizer state as tensors that such files can hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pretune.core.config import InputError

if TYPE_CHECKING:
    from torch import Tensor

DAMAGED = "delete its folder to go on from an older checkpoint, or restore it from a copy"
"""What to do about a file of a checkpoint that cannot be read."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write tensors and what the file's header says; OSError where it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt", **header})
    except SafetensorError as error:
        raise OSError(re.sub(r".*I/O error: | \(os error \d+\)", "", str(error))) from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, on the CPU, and header; InputError for a file that cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensors(), file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path} ({error}); {DAMAGED}") from None


def packed(name: str, value: Tensor) -> dict[str, Tensor]:
    """A tensor of an optimizer's state, or what it is made of where it is torchao's 8-bit state."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if not is_traceable_wrapper_subclass(value):
        return {name: value}
    return {f"{name}:{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]}


def unpacked(slots: Mapping[str, Tensor], parameter: Tensor) -> dict[str, Tensor]:
    """The state of a parameter, its 8-bit tensors put together again."""
    whole = {slot: value for slot, value in slots.items() if ":" not in slot}
    for slot in sorted({slot.partition(":")[0] for slot in slots if ":" in slot}):
        from torchao.optim.subclass_8bit import OptimState8bit

        codes, scale, qmap = (slots[f"{slot}:{part}"] for part in OptimState8bit.tensor_attrs)
        signed = bool(qmap[0] < 0)  # the map of what has no sign begins at 0
        whole[slot] = OptimState8bit(codes, scale, qmap, signed, dtype=parameter.dtype)
    return whole


def plain_name(name: str) -> str:
    """A parameter's name without what torch.compile puts into it."""
    return name.replace("_orig_mod.", "")
