"""Compile a step before the clock starts, and remember how long it took."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from pretune.checkpoint import store as checkpoint
from pretune.core.batch import Batch
from pretune.core.files import fingerprint, write_json
from pretune.model.transformer import Transformer
from pretune.optim.optimizers import compile_update, compiles_update
from pretune.run.config import RunConfig
from pretune.run.folder import cache_folder
from pretune.tasks.train.micro_batch import LossOf

LARGE = 0.2
"""Share of a time budget above which compiling may not be worth it."""


def compile_ahead(
    config: RunConfig,
    model: Transformer,
    optimizer: Optimizer,
    loss_of: LossOf,
    batch: Batch,
    say: Callable[[str], None],
) -> None:
    """Compile the forward and backward pass on a batch whose gradients are discarded, so that no budget pays for it."""
    model.train()
    if compiles_update(optimizer):
        say(f"compiling the update of optimizer={config.optimizer.kind} (once) ...")
        compile_update(optimizer)
    if not config.precision.compile:
        return
    times = CompileTimes.of(config, model, len(batch.inputs))
    say(times.announced(config.budget.time))
    started, random_state = time.perf_counter(), checkpoint.random_state(model)
    loss_of(batch)["loss"].backward()
    optimizer.zero_grad(set_to_none=True)
    checkpoint.set_random_state(model, random_state)
    seconds = time.perf_counter() - started
    say(f"compiled in {seconds:.0f} s")
    times.remember(seconds)


@dataclass(frozen=True)
class CompileTimes:
    """How long compiling a step took on this machine, keyed by what it depends on; stored beside the compiled code."""

    path: Path
    key: str

    @classmethod
    def of(cls, config: RunConfig, model: Transformer, size: int) -> CompileTimes:
        """For the step of a run with micro-batches of `size` sequences."""
        depends_on = {
            "torch": torch.__version__,
            "device": str(model.head_weight.device),
            "sequences": [size, config.data.sequence_length, config.data.packing.model_dump()],
            "parts": [
                section.model_dump()
                for section in (config.model, config.precision, config.adapter, config.quantization)
            ],
            "objective": config.stage.objective.model_dump(),
        }
        return cls(cache_folder() / "compiled" / "seconds.json", fingerprint(depends_on))

    def announced(self, budget: float | None) -> str:
        """The message before compiling for a budget of so many seconds."""
        last = self._read().get(self.key)
        known = f"{last:.0f} s last time" if isinstance(last, int | float) else "once"
        much = ""
        if isinstance(last, int | float) and budget is not None and last > LARGE * budget:
            much = f", of a budget of {budget:,.0f} s"
        return f"compiling the training step ({known}{much}; precision.compile=false skips it) ..."

    def remember(self, seconds: float) -> None:
        """Store how long it took; a cache that cannot be written is ignored."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {**self._read(), self.key: round(seconds, 1)})
        except OSError:
            pass

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}
