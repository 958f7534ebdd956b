"""The allocator of a device's memory: what it raises when memory runs out, and the memory that it keeps cached."""

from __future__ import annotations

import re

# torch.OutOfMemoryError is raised for CUDA's allocator only; Apple's raises a RuntimeError, and so do cuBLAS, cuDNN,
# Triton and the CPU.
_OUT_OF_MEMORY = re.compile("out of memory|ALLOC_FAILED|can't allocate memory|not enough memory", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the device's memory has run out, on any device."""
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def release_cached_memory() -> None:
    """Give back what the allocator of the GPU keeps for later: cached in pieces for old shapes, it is of no use to new
    ones."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
