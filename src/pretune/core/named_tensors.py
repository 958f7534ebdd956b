"""Stored tensors by name, and those of a model that they are for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def misfit(stored: Mapping[str, Tensor], own: Mapping[str, Tensor], extra: str) -> str | None:
    """What keeps `stored` from taking the place of `own`, by name and shape: three faults at most, and how many more;
    None where nothing does. `extra` is said of a name that only `stored` has."""
    faults = [f"{name} is missing" for name in own if name not in stored]
    faults += [f"{name} {extra}" for name in stored if name not in own]
    faults += [
        f"{name} is {list(stored[name].shape)}, in the model {list(own[name].shape)}"
        for name in own
        if name in stored and stored[name].shape != own[name].shape
    ]
    more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
    return "; ".join(faults[:3]) + more if faults else None


def copy_over(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Put the values of `stored` into the tensors of `own`."""
    import torch

    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])
