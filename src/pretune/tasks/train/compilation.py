"""Compile a step before the clock starts, and remember how long it took."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pretune.checkpoint.generators import generator_states, set_generator_states
from pretune.core.batch import Batch
from pretune.core.files import fingerprint, write_json
from pretune.model.build import Model
from pretune.optim.optimizers import compile_update, compiles_update
from pretune.run.config import RunConfig
from pretune.run.folder import cache_folder
from pretune.tasks.train.micro_batch import LossOf
from pretune.tasks.train.qat import fake_quantized

LARGE = 0.2
"""Share of a time budget above which compiling may not be worth it."""


class Compilation:
    """Compiles a run's step and update before the clock starts, and says so: once for each shape of a micro-batch."""

    def __init__(
        self, config: RunConfig, model: Model, optimizer: Optimizer, loss_of: LossOf, say: Callable[[str], None]
    ) -> None:
        self._config, self._model, self._optimizer, self._say = config, model, optimizer, say
        self._loss_of = loss_of
        self._compiled: set[tuple[int, bool]] = set()
        self._update_compiled = not compiles_update(optimizer)

    def loss_of(self, batch: Batch) -> dict[str, Tensor]:
        """The run's loss; says so if this is the first call for such a batch, which compiles the step."""
        if self._is_new(batch):
            self._say(self._times(batch).announced(self._config.budget.time))
            self._compiled.add(self._kind(batch))
        return self._loss_of(batch)

    def passes(self, batch: Batch) -> None:
        """A forward and a backward pass, which leave gradients; says how long it took if they were compiled."""
        new, started = self._is_new(batch), time.perf_counter()
        self.loss_of(batch)["loss"].backward()
        if new:
            seconds = time.perf_counter() - started
            self._say(f"compiled in {seconds:.0f} s")
            self._times(batch).remember(seconds)

    def ahead(self, batch: Batch) -> None:
        """Compile what is not compiled yet, on a batch whose gradients are discarded, so that no budget pays for it."""
        self._model.train()
        if not self._update_compiled:
            self._say(f"compiling the update of optimizer={self._config.optimizer.kind} (once) ...")
            compile_update(self._optimizer)
            self._update_compiled = True
        if self._is_new(batch):
            random_state = generator_states(self._model)
            self.passes(batch)
            self._optimizer.zero_grad(set_to_none=True)
            set_generator_states(self._model, random_state)

    def _is_new(self, batch: Batch) -> bool:
        return self._config.precision.compile and self._kind(batch) not in self._compiled

    def _kind(self, batch: Batch) -> tuple[int, bool]:
        """What the compiled code depends on that changes within a run."""
        return len(batch.inputs), fake_quantized(self._config, self._model)

    def _times(self, batch: Batch) -> CompileTimes:
        return CompileTimes.of(self._config, self._model, len(batch.inputs))


@dataclass(frozen=True)
class CompileTimes:
    """How long compiling a step took on this machine, keyed by what it depends on; stored beside the compiled code."""

    path: Path
    key: str

    @classmethod
    def of(cls, config: RunConfig, model: Model, size: int) -> CompileTimes:
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
