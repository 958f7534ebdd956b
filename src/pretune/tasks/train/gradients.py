"""The gradients of a step: accumulated over micro-batches, clipped, and in float16 recomputed if they overflow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pretune.compute.loss_scale import LossScale
from pretune.core.batch import Batch
from pretune.optim.optimizers import clip_gradients
from pretune.parallel.data_parallel import SharedGradients
from pretune.parallel.processes import Processes
from pretune.tasks.train.micro_batch import MicroBatch, Say, accumulate


@dataclass(frozen=True)
class StepGradients:
    """Computes the gradients of a step."""

    shared: SharedGradients
    model: nn.Module
    optimizer: Optimizer
    micro_batch: MicroBatch
    clip_norm: float | None
    scale: LossScale
    say: Say
    processes: Processes

    def find(self, batch: Batch, scored: int, rewind: Callable[[], None]) -> tuple[dict[str, Tensor], Tensor]:
        """Leave in the model the clipped gradients of the mean over what the step scores, of which `batch` is the part
        of this process; returns the sums over the step, and the norm of the gradients before clipping: not finite where
        they are no good. `scored`: how much the whole step scores.

        The random generators are set by `rewind`. With a loss scale the step is done again with half of it for as long
        as gradients overflow: neither a batch nor a step of the schedule is lost to that. Where no scale helps, it is
        left as it was.
        """
        before = self.scale.factor
        while True:
            rewind()
            divisor = max(scored, 1) / self.scale.value / self.processes.count
            sums = accumulate(self.shared, self.optimizer, batch, divisor, self.micro_batch, self.say)
            sums = self.processes.sums(sums)
            norm = clip_gradients(self.model, self.clip_norm, self.scale.value)
            if self.scale.factor is None:
                return sums, norm
            if torch.isfinite(norm):
                self.scale.step()
                return sums, norm
            if not torch.isfinite(sums["loss"]) or not self.scale.lower():
                self.scale.factor = before
                return sums, norm
            self.optimizer.zero_grad(set_to_none=True)
