"""The parts of an assembled run, as tasks pass them around."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pretune.core.batch import Batch
from pretune.data.shards import Prepared
from pretune.data.tokenizer import Tokenizer
from pretune.model.build import Model


@dataclass(frozen=True)
class Parts:
    """The parts of a run that every task needs."""

    device: torch.device
    tokenizer: Tokenizer
    data: Prepared
    model: Model
    frozen: Frozen | None = None
    """The model that the objective compares with, unless it has none or the data already has what this one says."""


@dataclass(frozen=True)
class Frozen:
    """A frozen model beside the one in training: the reference model of preferences, or a teacher. It is what it should
    be inside `mode()`."""

    model: Model
    mode: Callable[[], AbstractContextManager[object]]

    def fill(self, batch: Batch, outputs: Callable[[Model, Batch], dict[str, Tensor]]) -> Batch:
        """`batch` with what the model says of it, which `outputs` asks."""
        with torch.no_grad(), self.mode():
            return replace(batch, reference=outputs(self.model, batch))
