"""Memory that runs out, as each device says it, and expandable segments of CUDA's allocator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pretune.compute import allocator as module
from pretune.compute.allocator import is_out_of_memory, use_expandable_segments

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 39.4 GiB"
        ),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.05 GiB, max allowed: 18.13 GiB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_memory_that_runs_out_is_recognized(error: RuntimeError) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        # A kernel needs more shared memory than there is, which smaller batches do not change.
        RuntimeError("OutOfMemoryError: out of resource: triton_tem Required: 81920 Hardware limit:65536"),
        ValueError("out of memory"),
    ],
)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not is_out_of_memory(error)


class Machine:
    """A Linux machine with an NVIDIA GPU; what it can do is set."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, kernel: str = "6.8.0-48-generic") -> None:
        self.settings: list[str] = []
        self.maps, self.has_nvml, self.root = True, True, root
        (root / "proc/sys/kernel").mkdir(parents=True)
        (root / "proc/sys/kernel/osrelease").write_text(kernel + "\n")
        monkeypatch.setattr(module.sys, "platform", "linux")
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", self.settings.append)
        monkeypatch.setattr(torch, "empty", self.empty)
        monkeypatch.setattr(module.ctypes, "CDLL", self.library)
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            monkeypatch.delenv(name, raising=False)

    def library(self, name: str) -> None:
        if not self.has_nvml:
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    def empty(self, *size: int, device: torch.device) -> Any:
        if not self.maps:
            raise RuntimeError("CUDA driver error: operation not supported")


def test_segments_are_expandable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, monkeypatch)
    use_expandable_segments(CUDA, tmp_path)
    assert machine.settings == ["expandable_segments:True"]
    use_expandable_segments(torch.device("cpu"), tmp_path)
    assert len(machine.settings) == 1


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_has_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    machine = Machine(tmp_path, monkeypatch)
    monkeypatch.setenv(name, "max_split_size_mb:128")
    use_expandable_segments(CUDA, tmp_path)
    assert machine.settings == []


@pytest.mark.parametrize("kernel", ["5.15.167.4-microsoft-standard-WSL2", "5.15.148-tegra"])
def test_not_where_they_fail_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    machine = Machine(tmp_path, monkeypatch, kernel)
    use_expandable_segments(CUDA, tmp_path)
    assert machine.settings == []


def test_not_without_nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, monkeypatch)
    machine.has_nvml = False
    use_expandable_segments(CUDA, tmp_path)
    assert machine.settings == []


def test_a_driver_that_cannot_do_it_has_ordinary_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, monkeypatch)
    machine.maps = False
    use_expandable_segments(CUDA, tmp_path)
    assert machine.settings == ["expandable_segments:True", "expandable_segments:False"]
