"""A run's loss on dummy batches, of all its layers or of some."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from pretune.adapters.config import NoAdapterConfig
from pretune.compute.compilation import checkpoint_activations
from pretune.compute.precision import autocast
from pretune.core.batch import Batch
from pretune.memory.frozen import Frozen
from pretune.model.attention import Attention
from pretune.model.build import Model
from pretune.objectives.objective import objective_of
from pretune.run.config import RunConfig

CPU = torch.device("cpu")


class DryRun(nn.Module):
    """A run's loss, in its precision, on dummy batches."""

    def __init__(self, config: RunConfig, model: Model, frozen: Frozen, kind: str) -> None:
        super().__init__()
        self.config, self.model, self.frozen = config, model.train(), frozen
        if kind == "cuda":
            # Its kernels draw attention's dropout as they go. What runs here, on a CPU, would keep all weights for it.
            for attention in (module for module in model.modules() if isinstance(module, Attention)):
                attention.dropout = 0.0
        if config.precision.activation_checkpointing and not config.precision.compile:
            checkpoint_activations(model.layers)

    def batch(self, size: int) -> dict[str, Tensor | None]:
        shape = (size, self.config.data.sequence_length)
        tokens = torch.zeros(shape, dtype=torch.int64)
        isolated = self.config.data.packing.isolate
        documents = torch.zeros(shape, dtype=torch.int32) if isolated else None
        said = {f"said/{name}": tensor for name, tensor in self.frozen.says(size).items()}
        return {"tokens": tokens, "documents": documents, **said, **self.frozen.head()}

    def forward(self, given: dict[str, Any]) -> Tensor:
        tokens = given["tokens"]
        with autocast(self.config.precision, CPU):
            said = {name.removeprefix("said/"): one for name, one in given.items() if name.startswith("said/")}
            teacher: Any = SimpleNamespace(
                config=self.frozen.teacher and self.frozen.teacher.config, head_weight=given.get("head")
            )
            batch = Batch(tokens, tokens, given["documents"], said)
            return objective_of(self.config.stage.objective, teacher).sums(self.model, batch)["loss"]


def shallow(config: RunConfig, num_layers: int | None) -> RunConfig:
    """A run with so many layers of the same kind, or with all; a target in one block is applied to all blocks."""
    changes: dict[str, Any] = {}
    if num_layers is not None:
        changes["model"] = config.model.model_copy(update={"num_layers": num_layers})
    if not isinstance(config.adapter, NoAdapterConfig):
        targets = tuple(re.sub(r"^layers\.\d+\.", "", target) for target in config.adapter.targets)
        changes["adapter"] = config.adapter.model_copy(update={"targets": targets})
    return config.model_copy(update=changes)
