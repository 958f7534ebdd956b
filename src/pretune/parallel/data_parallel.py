"""Data parallelism: every process reads its share of a batch, and gradients are summed over all of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pretune.core.batch import Batch
from pretune.parallel.processes import ALONE, Processes

LossOf = Callable[[Batch], dict[str, Tensor]]


class SharedGradients:
    """A loss whose backward pass leaves in `model` the gradients of all processes: by DistributedDataParallel where
    each has the whole model, by FSDP2 where it is `sharded` (see fully_sharded).

    `loss_of` gives sums over a micro-batch, by name; `loss` is differentiated. torch divides the sum of the gradients
    by the number of processes: divide the loss by the count of the whole step over that number.
    """

    def __init__(self, model: nn.Module, loss_of: LossOf, processes: Processes = ALONE, sharded: bool = False) -> None:
        self.loss_of = loss_of
        self._sharded: Any = model if sharded else None
        self._wrapped: DistributedDataParallel | None = None
        if processes.count > 1 and not sharded:
            with warnings.catch_warnings():
                # torch 2.13 has another name for the option, which earlier versions lack.
                warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
                # Weights are equal already, because all processes draw or read the same; buffers never change.
                self._wrapped = DistributedDataParallel(
                    _Loss(model, loss_of), broadcast_buffers=False, init_sync=False, gradient_as_bucket_view=True
                )
            self.loss_of = self._wrapped

    def unshared(self) -> AbstractContextManager[object]:
        """Within it, gradients are added up in this process only: those of all micro-batches but the last. Shared-out
        ones are added up by the processes that share a copy of the model: whole gradients would not fit."""
        if self._sharded is not None:
            return _unreplicated(self._sharded)
        return nullcontext() if self._wrapped is None else self._wrapped.no_sync()


@contextmanager
def _unreplicated(model: Any) -> Iterator[None]:
    model.set_requires_all_reduce(False)
    try:
        yield
    finally:
        model.set_requires_all_reduce(True)


class _Loss(nn.Module):
    """The loss as a module: what DistributedDataParallel wraps, and whose forward pass it follows."""

    def __init__(self, model: nn.Module, loss_of: LossOf) -> None:
        super().__init__()
        self.model, self._loss_of = model, loss_of

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self._loss_of(batch)
