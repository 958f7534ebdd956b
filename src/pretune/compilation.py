"""What is done to a training step from outside to make it fast: compilation, and what becomes of freed memory."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def compile_step(loss: Callable[P, R]) -> Callable[P, R]:
    """`loss` compiled for the shapes that it is called with; other shapes are compiled when they first come.

    The backward pass computes cheap things again (norms, activations, casts) and the forward pass keeps only what
    matrix products and attention read: a third less memory for a small model, at no cost in time, because reading a
    tensor back takes as long as making it again.
    """
    import torch
    import torch._functorch.config as partitioner

    compiled = torch.compile(loss, dynamic=False)

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        # Anything below 1 makes the partitioner try cheap recomputation first, and that alone saves more than a tenth.
        with partitioner.patch(activation_memory_budget=0.9):
            return compiled(*args, **kwargs)

    return run


def keep_freed_memory() -> None:
    """Let the C library keep what a training step on the CPU frees, for the next step, instead of returning it.

    Otherwise the kernel hands out (and clears) the same hundreds of megabytes at every step, a page at a time: 10-15%
    of the time of a small model. Does nothing where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 30)
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as in malloc.h
