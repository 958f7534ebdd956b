"""The message for memory that runs out, where smaller micro-batches are no help."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pretune.compute import hardware
from pretune.compute.device import pick_device
from pretune.core.config import InputError
from pretune.core.units import memory
from pretune.model.build import new_model
from pretune.run.config import RunConfig

_SMALLER = {
    "train": "a smaller evaluation.micro_batch, or in a new run (name=...) optimizer=muon, ",
    "evaluate": "a smaller evaluation.micro_batch or evaluation.answers.batch_size, ",
    "generate": "a smaller generate.batch_size or generate.max_new_tokens, ",
}
"""What takes less memory, by task, besides a smaller model."""


def out_of_memory(config: RunConfig, total_memory: Callable[[torch.device], int] = hardware.total_memory) -> InputError:
    """The error for a task whose device has no memory left for the model, its optimizer or an evaluation."""
    device = pick_device(config.device)
    with torch.device("meta"):
        weights = sum(parameter.nbytes for parameter in new_model(config.model).parameters())
    total = total_memory(device)
    remedies = ("" if weights > total else _SMALLER.get(config.task, "")) + "a smaller model"
    remedies += "" if device.type == "cpu" else " or device=cpu"
    return InputError(
        f"out of memory on {hardware.device_name(device)}, which has {memory(total)}; the model's weights alone take "
        f"{memory(weights)}; {remedies} may fit"
    )
