"""The allocator of a device's memory: what it raises when memory runs out, and how it uses what it has been given."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pretune.compute.hardware import system_file

if TYPE_CHECKING:
    import torch

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


def use_expandable_segments(device: torch.device, root: Path) -> None:
    """Let CUDA's allocator extend the memory that it has been given, instead of adding separate pieces, in which memory
    that was freed for one shape is often too small for another.

    Leaves alone what the user has set in the environment, and platforms that do not support it. `root` is the folder
    that contains proc/.
    """
    import torch

    chosen = any(os.environ.get(name) for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    if chosen or device.type != "cuda" or torch.version.cuda is None or not _maps_memory(root):
        return
    set_option = torch._C._accelerator_setAllocatorSettings
    set_option("expandable_segments:True")
    try:
        torch.empty(1, device=device)
    except RuntimeError:
        # A driver that cannot do it, such as a virtual GPU's, fails here; if memory has run out, that comes up later.
        set_option("expandable_segments:False")


def _maps_memory(root: Path) -> bool:
    """Whether CUDA can map memory to addresses of torch's choice on this platform, and torch can ask NVML about it."""
    kernel = system_file(root / "proc/sys/kernel/osrelease").lower()
    # WSL and Jetson accept the setting and fail later (pytorch issue 192330, unsloth-zoo pull request 1235).
    if sys.platform != "linux" or "microsoft" in kernel or "tegra" in kernel:
        return False
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False  # torch would crash
    return True
