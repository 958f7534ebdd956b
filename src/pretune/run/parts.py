"""What the tasks pass around of a run that is put together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pretune.core.batch import Batch
from pretune.data.shards import Prepared
from pretune.data.tokenizer import Tokenizer
from pretune.model.transformer import Transformer


@dataclass(frozen=True)
class Parts:
    """What every verb needs of a run."""

    device: torch.device
    tokenizer: Tokenizer
    data: Prepared
    model: Transformer
    reference: Reference | None = None
    """What preferences are measured against, where the data does not know it already."""


@dataclass(frozen=True)
class Reference:
    """A model that log-probabilities of pairs are compared with: `log_probs` of it [B, P, 2], within `mode`."""

    log_probs: Callable[[Batch], Tensor]
    mode: Callable[[], AbstractContextManager[None]]

    def fill(self, batch: Batch) -> Batch:
        """`batch` with its reference."""
        with torch.no_grad(), self.mode():
            return replace(batch, reference=self.log_probs(batch))
