"""Choose the device of a run, and find GPUs that are in the machine but not visible to torch."""

from __future__ import annotations

import os
import platform
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from pretune.compute.hardware import system_file
from pretune.core.config import ConfigError

if TYPE_CHECKING:
    import torch

_NVIDIA, _AMD = "0x10de", "0x1002"
_DISPLAY, _ACCELERATOR = "0x03", "0x12"
"""Prefixes of the PCI class of graphics cards and of compute-only cards."""


def pick_device(name: str) -> torch.device:
    """The torch device for the key `device`; auto prefers CUDA, then Apple's GPU, then the CPU."""
    import torch

    cuda = torch.cuda.is_available() and _without_kernels() is None
    available = {"cuda": cuda, "mps": torch.backends.mps.is_available(), "cpu": True}
    present = [kind for kind, there in available.items() if there]
    if name == "auto":
        return torch.device(present[0])
    if name not in present:
        why = undetected_gpu(Path("/")) if name == "cuda" else None
        raise ConfigError(
            f"device={name}: torch {torch.__version__} finds none here; it finds {', '.join(present)}"
            + (f" ({why})" if why else "; device=auto takes the best available device")
        )
    return torch.device(name)


def undetected_gpu(root: Path) -> str | None:
    """Which GPU of this machine torch does not see or cannot use, and why; None if there is none, or if it is hidden on
    purpose. `root` is the folder that contains proc/ and sys/."""
    import torch

    if torch.cuda.is_available():
        return _without_kernels()
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return f"this Mac has a GPU, but torch {torch.__version__} does not see it: it needs macOS 14 or newer"
    vendor = _gpu_vendor(root)
    hidden = "CUDA_VISIBLE_DEVICES" in os.environ or "HIP_VISIBLE_DEVICES" in os.environ
    if vendor is None or hidden:
        return None
    nvidia = vendor == _NVIDIA
    maker, toolkit = ("NVIDIA", "CUDA") if nvidia else ("AMD", "ROCm")
    there = f"this machine has an {maker} GPU, but torch {torch.__version__}"
    built = torch.version.cuda if nvidia else torch.version.hip
    if built is None:
        return f"{there} is built without {toolkit}; pytorch.org has builds with it"
    driver = _nvidia_driver(root) if nvidia else None
    state = f"its driver ({driver}) may be too old for {toolkit} {built}" if driver else "no driver is loaded"
    return f"{there} does not see it: {state}"


def _without_kernels() -> str | None:
    """Why this machine's NVIDIA GPU cannot run this build of torch; None if it can."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says the same in a dozen lines
        major, minor = torch.cuda.get_device_capability()
    built = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", one) for one in torch.cuda.get_arch_list()]
    codes = [(one[1], int(one[2]), int(one[3])) for one in built if one]
    # Machine code runs on the later minor versions of its major version; `compute` is compiled for any later GPU.
    runs = [(x, y) <= (major, minor) and (kind == "compute" or x == major) for kind, x, y in codes]
    if any(runs) or not codes:
        return None
    oldest = min((x, y) for _, x, y in codes)
    which = "for an older version of CUDA" if (major, minor) < oldest else "that is newer"
    return (
        f"torch {torch.__version__} has no kernels for {torch.cuda.get_device_name()}, compute capability "
        f"{major}.{minor}; a build {which} may have them (pytorch.org)"
    )


def _gpu_vendor(root: Path) -> str | None:
    """Vendor of a GPU on the PCI bus; for AMD only compute-only cards, because many CPUs have integrated graphics."""
    for card in sorted((root / "sys/bus/pci/devices").glob("*")):
        vendor, kind = (system_file(card / name).strip() for name in ("vendor", "class"))
        if vendor == _NVIDIA and kind.startswith((_DISPLAY, _ACCELERATOR)):
            return vendor
        if vendor == _AMD and kind.startswith((_ACCELERATOR, "0x0380")):
            return vendor
    return None


def _nvidia_driver(root: Path) -> str | None:
    found = re.search(r"Kernel Module\D*([\d.]+)", system_file(root / "proc/driver/nvidia/version"))
    return found[1] if found else None
