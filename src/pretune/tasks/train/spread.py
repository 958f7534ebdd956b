"""How a run is spread over its processes: what parallel=auto resolves to, and whether a step can be shared out."""

from __future__ import annotations

from dataclasses import replace

import torch

from pretune.compute.hardware import total_memory, usable
from pretune.core.config import ConfigError
from pretune.memory.estimate import Footprint
from pretune.parallel.processes import Processes
from pretune.run.config import RunConfig
from pretune.run.precision import Resolved
from pretune.run.sharding import shared_parameters_are_plain


def spread(resolved: Resolved, processes: Processes) -> Resolved:
    """The run with the kind of parallelism that `auto` means here, the same in all processes.

    Raises ConfigError for a run that would have to be shared out, and cannot be.
    """
    config = resolved.config
    if config.parallel.kind != "auto":
        return resolved
    kind = "single" if processes.count == 1 else "ddp"
    if kind == "ddp" and resolved.device.type != "cpu":
        kind = processes.decided("ddp" if _fits(config, resolved.device) else "fsdp")
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"kind": kind})})
    if faults := [*shared_parameters_are_plain(config)]:
        raise ConfigError(
            f"weights, gradients and optimizer state do not fit one {resolved.device.type} device, and {faults[0]}, "
            "with a smaller model"
        )
    return replace(resolved, config=config)


def _fits(config: RunConfig, device: torch.device) -> bool:
    """Whether a process has room for a whole model with its gradients and its optimizer, and a step of one sequence."""
    return Footprint(config, device.type).peak(1) <= usable(total_memory(device), device.type)


def check_share(config: RunConfig, processes: Processes) -> None:
    """Raise ConfigError, with the nearest that works, if a step cannot be shared out equally."""
    unit = config.data.sequence_length * config.batch.micro_batch_size * processes.count
    tokens = config.batch.smallest
    if tokens % unit:
        key = "batch.tokens" if config.batch.warmup is None else "batch.warmup.start"
        nearest = max(round(tokens / unit), 1) * unit
        raise ConfigError(
            f"{key} ({tokens}) is not a multiple of what {processes.count} processes read at once ({unit} tokens): set "
            f"{key}={nearest}, a smaller batch.micro_batch, or start another number of processes"
        )
