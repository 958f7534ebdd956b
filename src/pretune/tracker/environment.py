"""The environment of a run: versions, the commit of the code, the device."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import tomllib
from pathlib import Path
from typing import Any

from pretune.core.files import fingerprint, measure

PACKAGES = ("torch", "torchao", "peft", "transformers", "datasets", "tokenizers", "lion-pytorch", "wandb", "numpy")


def environment(device: str | None) -> dict[str, Any]:
    """Versions, git commit of the code (null outside a repository), and `device` (`cpu`, `cuda:0`...) by its name.

    null is for a device that the caller does not know.
    """
    return {
        "versions": versions(),
        "git_commit": git_commit(Path(__file__).resolve().parent),
        "device": device,
        "device_name": None if device is None else device_name(device),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
    }


def versions() -> dict[str, str]:
    """Versions of Pretune, Python and each installed library."""
    found = {"pretune": _own_version(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _own_version() -> str:
    """From pyproject.toml, its only home: Pretune is run from its repository and never installed."""
    try:
        text = (Path(__file__).resolve().parents[3] / "pyproject.toml").read_text()
    except OSError:
        return "unknown"
    return tomllib.loads(text)["project"]["version"]


def code_fingerprint() -> str:
    """Sixteen hex digits that depend on every source file of Pretune."""
    folder = Path(__file__).resolve().parents[1]
    return fingerprint({str(file.relative_to(folder)): measure(file) for file in sorted(folder.rglob("*.py"))})


def git_commit(folder: Path) -> str | None:
    """Commit of the repository that tracks `folder`, with `-dirty` appended if tracked files have changed."""
    # Code may lie inside the repository of something else that does not track it.
    if not _git(folder, "ls-files", "--", "."):
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    return f"{commit}-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else commit


def device_name(device: str) -> str:
    """The vendor's name of the device."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    return _cpu_name() if device == "cpu" else platform.processor() or platform.machine()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(folder: Path, *arguments: str) -> str:
    """Output of a git command; empty if git or the repository is missing or slow."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
