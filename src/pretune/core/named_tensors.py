"""Match stored tensors with a model's tensors by name and shape, and copy them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pretune.core.config import InputError

if TYPE_CHECKING:
    from torch import Tensor


def is_in_block(name: str) -> bool:
    """Whether a layer, or a tensor, is in one of a model's numbered blocks, as in `layers.0.attention.output`."""
    return any(part.isdigit() for part in name.split(".")[1:])


def name_in_block(name: str) -> str | None:
    """A layer's name within its block, which follows the block's number: `attention.output` of
    `layers.0.attention.output`; None for what is in no block."""
    parts = name.split(".")
    number = next((at for at, part in enumerate(parts) if at and part.isdigit()), len(parts))
    return ".".join(parts[number + 1 :]) or None


def misfit(stored: Mapping[str, Tensor], own: Mapping[str, Tensor], extra: str) -> str | None:
    """Why `stored` cannot replace `own`, by name and shape: at most three faults and the number of further ones; None
    if it can. `extra` describes a name that only `stored` has."""
    faults = [f"{name} is missing" for name in own if name not in stored]
    faults += [f"{name} {extra}" for name in stored if name not in own]
    faults += [
        f"{name} is {list(stored[name].shape)}, in the model {list(own[name].shape)}"
        for name in own
        if name in stored and stored[name].shape != own[name].shape
    ]
    more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
    return "; ".join(faults[:3]) + more if faults else None


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor with a value that is not finite, or None. Integers, packed ones too, are always finite."""
    import torch

    plain = (torch.Tensor, torch.nn.Parameter)  # others are quantized: they have a dtype, but no such values
    return next(
        (
            name
            for name, one in tensors.items()
            if type(one) in plain and one.is_floating_point() and not one.isfinite().all()
        ),
        None,
    )


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise InputError if a tensor that was read from `path` has a value that is not finite."""
    if name := not_finite(tensors):
        raise InputError(
            f"the weights in {path} are not finite ({name}): their run had diverged; choose an earlier checkpoint with "
            "checkpoint.use=STEP, or train again with a lower optimizer.lr"
        )


def copy_over(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Copy the values of `stored` into the tensors of `own`."""
    import torch

    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])
