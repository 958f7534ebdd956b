"""Deterministic algorithms: the same run twice gives the same bits, on a GPU too."""

from __future__ import annotations

import os


def use_deterministic_algorithms() -> None:
    """Make torch choose algorithms that give the same bits every time, for the rest of the process. Call it before CUDA
    is used. An operation that has no such algorithm raises RuntimeError.

    On a GPU many sums (gradients of embeddings and of attention, some matrix products) are otherwise made in whatever
    order threads finish. On a CPU, with the same number of threads, they never are.
    """
    import torch

    # cuBLAS needs a workspace of its own for each stream; it reads this when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # Only for finding bugs, and slow.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
