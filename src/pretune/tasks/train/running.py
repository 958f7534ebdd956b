"""A run in progress: its parts, and the clock that it is timed by."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.optim import Optimizer

from pretune.checkpoint import store as checkpoint
from pretune.compute.config import Activations
from pretune.compute.hardware import peak_flops
from pretune.data.loader import Loader
from pretune.data.mixture import Mixture
from pretune.model.build import Model
from pretune.optim.budget import Step
from pretune.optim.config import Overhead
from pretune.optim.trace import Trace
from pretune.parallel.processes import Processes
from pretune.run.assembly import Training
from pretune.run.config import RunConfig
from pretune.run.folder import RunFolder
from pretune.run.parts import Parts
from pretune.tasks.evaluate.task import Evaluator
from pretune.tasks.train.compilation import Compilation
from pretune.tasks.train.state import TrainingState
from pretune.tracker.tracker import NoTracker, Tracker
from pretune.training.ema import EMA
from pretune.training.signals import Interrupts


@dataclass(frozen=True)
class Instruments:
    """The clock, the peak speed and the hook of a run."""

    clock: Callable[[], float] = time.perf_counter
    """Seconds from an arbitrary origin."""
    peak_flops: Callable[[torch.device, set[Activations]], float] = peak_flops
    """The peak FLOP/s of a device in the fastest of these precisions."""
    on_begin: Callable[[Run, Step | Overhead], None] = lambda run, what: None
    """Called when a step, or overhead such as an evaluation, begins; its time already counts."""


@dataclass(frozen=True)
class Run:
    """The parts of a run in progress."""

    config: RunConfig
    folder: RunFolder
    training: Training
    loader: Loader | Mixture
    evaluator: Evaluator
    state: TrainingState
    tracker: Tracker | NoTracker
    interrupts: Interrupts
    trace: Trace
    replayed: list[Step] | None
    """The steps to take, if another run is replayed."""
    instruments: Instruments
    processes: Processes

    @property
    def parts(self) -> Parts:
        return self.training.parts

    @property
    def ema(self) -> EMA[Model] | None:
        return self.training.ema

    @property
    def optimizer(self) -> Optimizer:
        return self.training.optimizer

    @cached_property
    def compilation(self) -> Compilation:
        model, message = self.parts.model, self.tracker.message
        return Compilation(self.config, model, self.optimizer, self.training.loss_of, message)

    def whole(self) -> AbstractContextManager[object]:
        """A context in which every process can compute with the weights by itself, also where they are shared out."""
        if not self.training.sharded:
            return nullcontext()
        from pretune.parallel.fully_sharded import whole

        return whole(self.config.parallel, self.parts.model, used_parts(self).model)

    @contextmanager
    def timed(self, kind: Overhead) -> Iterator[None]:
        """Count the time of the block as overhead."""
        with self.state.timed(kind, self.instruments.clock):
            self.instruments.on_begin(self, kind)
            yield

    @property
    def saved(self) -> bool:
        """Whether the run is saved as it is after its newest step."""
        return checkpoint.is_saved(self.folder.checkpoints, self.state.step)


def peak_of(run: Run) -> float:
    """The peak FLOP/s of all devices in the precision that they are fastest in."""
    one = run.instruments.peak_flops(run.parts.device, {"float32", "bfloat16", run.config.precision.activations})
    return one * run.processes.count


def used_parts(run: Run) -> Parts:
    """The run's parts with the model that is evaluated and used later: the EMA, if there is one."""
    return run.parts if run.ema is None else replace(run.parts, model=run.ema.model)
