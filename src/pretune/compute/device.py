"""The device that a run is for, and GPUs that are in the machine although torch does not see them."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pretune.compute.hardware import system_file
from pretune.core.config import ConfigError

if TYPE_CHECKING:
    import torch

_NVIDIA, _AMD = "0x10de", "0x1002"
_DISPLAY, _ACCELERATOR = "0x03", "0x12"
"""What the PCI class of a graphics card, and of a card that only computes, begins with."""


def pick_device(name: str) -> torch.device:
    """The device that `device` names; auto takes CUDA, then Apple's GPU, then the CPU."""
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    present = [kind for kind, there in available.items() if there]
    if name == "auto":
        return torch.device(present[0])
    if name not in present:
        why = undetected_gpu(Path("/")) if name == "cuda" else None
        raise ConfigError(
            f"device={name}: torch {torch.__version__} finds none here; it finds {', '.join(present)}"
            + (f" ({why})" if why else "; device=auto takes the best that is there")
        )
    return torch.device(name)


def undetected_gpu(root: Path) -> str | None:
    """Which GPU this machine has without torch seeing it, and why; None where there is none, or where it is hidden on
    purpose. `root` is where proc/ and sys/ are."""
    import torch

    if sys.platform == "darwin" and platform.machine() == "arm64":
        return f"this Mac has a GPU, and torch {torch.__version__} does not see it: it needs macOS 14 or newer"
    vendor = _gpu_vendor(root)
    hidden = "CUDA_VISIBLE_DEVICES" in os.environ or "HIP_VISIBLE_DEVICES" in os.environ
    if vendor is None or hidden:
        return None
    nvidia = vendor == _NVIDIA
    maker, toolkit = ("NVIDIA", "CUDA") if nvidia else ("AMD", "ROCm")
    there = f"this machine has an {maker} GPU, and torch {torch.__version__}"
    built = torch.version.cuda if nvidia else torch.version.hip
    if built is None:
        return f"{there} is built without {toolkit}; pytorch.org has builds with it"
    driver = _nvidia_driver(root) if nvidia else None
    state = f"its driver ({driver}) may be too old for {toolkit} {built}" if driver else "no driver is loaded"
    return f"{there} does not see it: {state}"


def _gpu_vendor(root: Path) -> str | None:
    """Whose GPU is on the PCI bus; of AMD only those that do nothing but compute, as many CPUs have one for screens."""
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
