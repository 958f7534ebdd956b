"""Tensors that several processes share out, on disk: each writes its own part as a safetensors file, by
torch.distributed.checkpoint. Any number of processes can read them, and so can one alone.

    shards/shard-<rank + 1>-model-00001-of-00001.safetensors
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pretune.checkpoint.tensors import DAMAGED
from pretune.core.config import InputError
from pretune.core.files import atomic_folder, measure
from pretune.core.named_tensors import is_shared_out

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SHARDS = "shards"


class Stored(NamedTuple):
    """What is known of a stored tensor before it is read."""

    shape: torch.Size
    dtype: torch.dtype


def is_main() -> bool:
    """Whether this is the process that writes what is whole."""
    return share()[0] == 0


def share() -> tuple[int, int]:
    """This process's number, and how many there are."""
    import torch.distributed as dist

    return dist.get_rank(), dist.get_world_size()


@contextlib.contextmanager
def together(path: Path) -> Iterator[Path]:
    """The temporary folder of the main process, which makes and publishes it as `atomic_folder` does, in all
    processes."""
    import torch.distributed as dist

    with atomic_folder(path) if is_main() else contextlib.nullcontext() as temporary:
        box = [temporary]
        dist.broadcast_object_list(box, src=0)
        assert box[0] is not None
        yield box[0]


def write_shards(folder: Path, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Write groups of tensors, by their prefixes, into a checkpoint's `folder`, each process its part of them, and
    return the measures of all files by their paths in it. All processes call it; OSError in all of them if one cannot
    write."""
    import torch.distributed as dist
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    path = folder / SHARDS
    tensors = {prefix + name: one for prefix, group in groups.items() for name, one in group.items()}
    try:
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(path), save_distributed=True))
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise next((cause for cause in causes if isinstance(cause, OSError)), OSError(str(causes[0]))) from None
    own = {f"{SHARDS}/{file.name}": measure(file) for file in path.glob(f"shard-{dist.get_rank() + 1:05d}-*")}
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return {name: one for part in found for name, one in part.items()}


def stored_tensors(folder: Path, prefix: str) -> dict[str, Stored]:
    """The tensors in a checkpoint's shards whose names begin with `prefix`, by the rest of their names; InputError if
    they cannot be read."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        metadata = HuggingFaceStorageReader(str(folder / SHARDS)).read_metadata()
    except (OSError, ValueError, KeyError, CheckpointException) as error:
        raise InputError(f"cannot read {folder / SHARDS} ({error}); {DAMAGED}") from None
    return {
        name.removeprefix(prefix): Stored(one.size, one.properties.dtype)
        for name, one in metadata.state_dict_metadata.items()
        if isinstance(one, TensorStorageMetadata) and name.startswith(prefix)
    }


def read_shards(folder: Path, prefix: str, into: Mapping[str, Tensor]) -> None:
    """Fill tensors of the right shapes with what is stored under `prefix` and their names. If any is shared out, all
    processes call it. InputError if the files cannot be read."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    alone, reader = not any(map(is_shared_out, into.values())), HuggingFaceStorageReader(str(folder / SHARDS))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            load({prefix + name: one for name, one in into.items()}, storage_reader=reader, no_dist=alone)
        except (OSError, CheckpointException) as error:
            raise InputError(f"cannot read {folder / SHARDS} ({error}); {DAMAGED}") from None
