"""The micro-batch: how many sequences go through the model at once. It is halved when memory runs out."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from pretune.compute import hardware
from pretune.compute.allocator import is_out_of_memory, release_cached_memory
from pretune.core.batch import Batch
from pretune.core.config import InputError
from pretune.core.files import write_json
from pretune.memory.estimate import Footprint
from pretune.parallel.data_parallel import SharedGradients
from pretune.run.config import RunConfig

LossOf = Callable[[Batch], dict[str, Tensor]]
"""Sums over the scored items of a micro-batch, by name; `loss` is minimized."""
Say = Callable[[str], None]
"""Shows the user a line."""


@dataclass
class MicroBatch:
    """The size of a micro-batch in sequences. If the configuration says auto, `path` is where it is remembered."""

    size: int
    device: str
    path: Path | None

    def remember(self) -> None:
        """Store the size, so that a resume on the same device does not search again."""
        if self.path is not None:
            write_json(self.path, {"size": self.size, "device": self.device})

    def halve(self, num_sequences: int) -> None:
        """Go on with the next smaller divisor of `num_sequences` that is at most half as large.

        Raises InputError where the configuration fixes the size, or where there is only one.
        """
        if self.path is None or self.size == 1:
            remedy = (
                "precision.activation_checkpointing=true or a smaller stage.objective.chunk_tokens may fit; so may a "
                "new run (name=...) of a smaller model or with a shorter data.sequence_length"
                if self.size == 1
                else f"set batch.micro_batch={_divisor(num_sequences, self.size // 2)}, or auto"
            )
            raise InputError(f"out of memory on {self.device} with {micro_batches(self.size)}; {remedy}")
        self.size = _divisor(num_sequences, self.size // 2)
        self.remember()


def micro_batches(size: int) -> str:
    """`micro-batches of 8 sequences`."""
    return f"micro-batches of {size} sequence{'' if size == 1 else 's'}"


def choose_micro_batch(
    config: RunConfig,
    device: torch.device,
    path: Path,
    trial: Callable[[int], None],
    say: Say,
    total_memory: Callable[[torch.device], int] = hardware.total_memory,
    processes: int = 1,
) -> MicroBatch:
    """The configured micro-batch; for `auto` the one that `path` remembers for this device, or the largest that fits.

    The largest is predicted, and where memory that runs out raises an error (on GPUs) also tried: `trial(size)` does
    the passes of a step, from no gradients, which `say` announces. `processes` share a step out. Raises InputError
    where not even one sequence fits.
    """
    name = hardware.device_name(device)
    fixed, num_sequences = config.batch.micro_batch, config.batch.smallest // config.data.sequence_length // processes
    if fixed != "auto":
        return MicroBatch(fixed, name, None)
    if (size := _remembered(path, name, num_sequences)) is not None:
        return MicroBatch(size, name, path)
    footprint = Footprint(config, device.type)
    size = footprint.largest(hardware.usable(total_memory(device), device.type), num_sequences)
    found = MicroBatch(size or 1, name, path)
    if device.type != "cpu":
        say(f"trying {micro_batches(found.size)} ...")
        while not _fits(trial, found.size, footprint.optimizer, device):
            release_cached_memory()
            tried = found.size
            found.halve(num_sequences)
            say(f"out of memory with {micro_batches(tried)}; trying {found.size} ...")
    elif size is None:
        found.halve(num_sequences)
    found.remember()
    return found


def _fits(trial: Callable[[int], None], size: int, reserve: int, device: torch.device) -> bool:
    """Whether a trial succeeds while as much memory is reserved as the optimizer's state will take."""
    try:
        held = torch.empty(reserve, dtype=torch.uint8, device=device)
        trial(size)
        return held.numel() == reserve
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False


def accumulate(
    shared: SharedGradients, optimizer: Optimizer, batch: Batch, divisor: float, micro_batch: MicroBatch, say: Say
) -> dict[str, Tensor]:
    """Add the gradients of a whole step's loss / `divisor`, micro-batch by micro-batch; returns its sums, detached.

    When memory runs out, the step begins again with smaller micro-batches, which `say` announces.
    """
    while True:
        try:
            return _accumulate(shared, batch, divisor, micro_batch.size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler, because the error's traceback keeps the tensors of the failed attempt alive.
        optimizer.zero_grad(set_to_none=True)
        release_cached_memory()
        tried = micro_batch.size
        micro_batch.halve(tried)  # what divides it divides every step, however long
        say(f"out of memory with {micro_batches(tried)}; the step begins again with {micro_batch.size}")


def _accumulate(shared: SharedGradients, batch: Batch, divisor: float, size: int) -> dict[str, Tensor]:
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(batch.inputs), size):
        last = start + size >= len(batch.inputs)
        with nullcontext() if last else shared.unshared():
            sums = shared.loss_of(batch.part(start, start + size))
            # Divided by the count of the whole step, so that the loss does not depend on the micro-batch.
            (sums["loss"] / divisor).backward()
        parts.append({name: value.detach() for name, value in sums.items()})
    return {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]}


def _remembered(path: Path, device: str, num_sequences: int) -> int | None:
    try:
        content = json.loads(path.read_text())
        size, on = content["size"], content["device"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # never written, or damaged: searching again does no harm
    return size if on == device and isinstance(size, int) and size >= 1 and num_sequences % size == 0 else None


def _divisor(num_sequences: int, at_most: int) -> int:
    return next(size for size in range(max(at_most, 1), 0, -1) if num_sequences % size == 0)
