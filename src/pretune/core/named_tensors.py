"""Match stored tensors with a model's tensors by name and shape, and copy them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pretune.core.config import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def is_in_block(name: str) -> bool:
    """Whether a layer, or a tensor, is in one of a model's numbered blocks, as in `layers.0.attention.output`."""
    return any(part.isdigit() for part in name.split(".")[1:])


def name_in_block(name: str) -> str | None:
    """A layer's name within its block, which follows the block's number: `attention.output` of
    `layers.0.attention.output`; None for what is in no block."""
    parts = name.split(".")
    number = next((at for at, part in enumerate(parts) if at and part.isdigit()), len(parts))
    return ".".join(parts[number + 1 :]) or None


class HasShape(Protocol):
    """A tensor, or what is known of one."""

    @property
    def shape(self) -> torch.Size: ...


def misfit(stored: Mapping[str, HasShape], own: Mapping[str, Tensor], extra: str) -> str | None:
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
    """The name of a tensor with a value that is not finite, or None. Integers, packed ones too, are always finite; of
    those that several processes share out, only this one's part is looked at."""
    import torch

    plain = (torch.Tensor, torch.nn.Parameter)  # others are quantized: they have a dtype, but no such values
    own = ((name, local(one)) for name, one in tensors.items())
    return next(
        (name for name, one in own if type(one) in plain and one.is_floating_point() and not one.isfinite().all()), None
    )


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that several share out (not a copy); any other as it is."""
    return tensor.to_local() if is_shared_out(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def is_shared_out(tensor: Tensor) -> bool:
    """Whether several processes share the tensor out. Asked of what only a DTensor has, because importing that takes
    half a second."""
    return hasattr(tensor, "device_mesh")


def is_sharded(model: nn.Module) -> bool:
    """Whether several processes share out parameters of the model; also while each has them whole. Asked of what only
    torch's FSDPModule has, see is_shared_out."""
    return hasattr(model, "unshard")


def shared_out(value: Tensor, like: Any) -> Tensor:
    """`value`, which all processes have whole, shared out as `like` is: as it is, if that is whole."""
    if not is_shared_out(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which some are shared out, all of them whole; every process must call it."""
    found: dict[str, Any] = dict(tensors)
    return {name: one.full_tensor() if is_shared_out(one) else one for name, one in found.items()}


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise InputError if a tensor that was read from `path` has a value that is not finite."""
    if name := not_finite(tensors):
        raise InputError(
            f"the weights in {path} are not finite ({name}): their run had diverged; choose an earlier checkpoint with "
            "checkpoint.use=STEP, or train again with a lower optimizer.lr"
        )


def copy_over(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Copy the values of `stored` into the tensors of `own`; of those that are shared out, this process's part."""
    import torch

    with torch.no_grad():
        for name, tensor in own.items():
            value = stored[name]
            local(tensor).copy_(local(value if is_shared_out(value) else shared_out(value, tensor)))
