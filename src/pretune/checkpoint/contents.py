"""The files of a checkpoint that hold tensors, and how they are written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pretune.checkpoint.optimizer_state import OF_OPTIMIZER, optimizer_state, random_tensors
from pretune.checkpoint.shards import is_main, write_shards
from pretune.checkpoint.tensors import named_weights, trained_weights, write_tensors
from pretune.core.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, measure, write_json
from pretune.core.named_tensors import is_sharded, whole_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

WEIGHTS, RAW, OPTIMIZER = "model.safetensors", "raw.safetensors", "optimizer.safetensors"
OF_WEIGHTS, OF_RAW = "weights:", "raw:"
"""Before the names of tensors in shards."""


class Adapter(NamedTuple):
    """What is stored for a model with an adapter, in place of its weights."""

    tensors: Mapping[str, Tensor]
    """The adapter's parameters (not copies), by their names in the file."""
    config: Mapping[str, Any]
    """JSON-serializable: what else peft needs to load it."""

    def whole(self) -> Adapter:
        """With whole tensors, for which all processes must ask."""
        return self._replace(tensors=whole_tensors(self.tensors))


def write(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    adapter: Adapter | None,
    averaged: nn.Module | None,
    random: Mapping[str, Tensor],
) -> dict[str, Any] | None:
    """Write the tensors of a checkpoint; return the measures of all files, or None in a process that only has a part of
    what is shared out."""
    weights = {} if adapter is not None else named_weights(averaged or model)
    raw = {} if averaged is None else trained_weights(model)
    slots, header = optimizer_state(model, optimizer)
    files: dict[str, Any] = {}
    if is_sharded(model):
        files = write_shards(folder, {OF_WEIGHTS: weights, OF_RAW: raw, OF_OPTIMIZER: slots})
        adapter = adapter and adapter.whole()
        if not is_main():
            return None
        weights, raw, slots = {}, {}, {}
    if weights:
        write_tensors(folder / WEIGHTS, weights, {})
    if raw:
        write_tensors(folder / RAW, raw, {})
    if adapter is not None:
        write_tensors(folder / ADAPTER_WEIGHTS, adapter.tensors, {})
        write_json(folder / ADAPTER_CONFIG, adapter.config)
    write_tensors(folder / OPTIMIZER, slots | random_tensors(random), header)
    return files | {file.name: measure(file) for file in sorted(folder.iterdir()) if file.is_file()}
