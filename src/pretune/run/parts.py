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
    reference: Reference | None = None
    """The reference model for preferences, unless the data already has its log-probabilities."""


@dataclass(frozen=True)
class Reference:
    """A reference model for preferences: `log_probs` returns [B, P, 2] and must be called inside `mode()`."""

    log_probs: Callable[[Batch], Tensor]
    mode: Callable[[], AbstractContextManager[None]]

    def fill(self, batch: Batch) -> Batch:
        """`batch` with its reference log-probabilities."""
        with torch.no_grad(), self.mode():
            return replace(batch, reference_log_probs=self.log_probs(batch))
