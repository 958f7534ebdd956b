"""Configuration of training in several processes."""

from __future__ import annotations

from typing import Literal

from pretune.core.config import Seconds, Section


class ParallelConfig(Section):
    kind: Literal["auto", "single", "ddp"]
    """How training is spread over the processes that torchrun or srun started. ddp: each process has the whole model
    and computes the gradients of its share of every batch (DistributedDataParallel); single: one process; auto: ddp
    where there are several processes, else single."""
    timeout: Seconds
    """Longest time that a process waits for the others, in seconds or as text (30m), before it ends with an error."""
