"""Devices that this machine lacks, and GPUs that torch does not see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretune.compute import device as module
from pretune.compute.device import pick_device, undetected_gpu
from pretune.core.config import ConfigError


@pytest.fixture(autouse=True)
def _linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def machine(root: Path, *cards: tuple[str, str], driver: str | None = None) -> Path:
    """A machine with these cards on its PCI bus, given by vendor and class."""
    for number, (vendor, kind) in enumerate(cards):
        folder = root / f"sys/bus/pci/devices/0000:0{number}:00.0"
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(f"{vendor}\n")
        (folder / "class").write_text(f"{kind}\n")
    if driver is not None:
        folder = root / "proc/driver/nvidia"
        folder.mkdir(parents=True)
        (folder / "version").write_text(f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Wed Feb\nGCC\n")
    return root


def test_no_gpu_is_nothing_to_speak_of(tmp_path: Path) -> None:
    assert undetected_gpu(machine(tmp_path, ("0x8086", "0x030000"), ("0x10de", "0x040300"))) is None, "sound only"


def test_an_old_driver_is_named(tmp_path: Path) -> None:
    found = undetected_gpu(machine(tmp_path, ("0x10de", "0x030200"), driver="470.82.01"))
    assert found is not None
    assert "NVIDIA GPU" in found
    assert "driver (470.82.01) may be too old for CUDA 13.0" in found


def test_a_driver_that_is_not_loaded(tmp_path: Path) -> None:
    assert "no driver is loaded" in str(undetected_gpu(machine(tmp_path, ("0x10de", "0x030000"))))


def test_a_build_of_torch_without_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in str(undetected_gpu(machine(tmp_path, ("0x10de", "0x030000"), driver="580.1")))


def test_a_gpu_that_is_hidden_on_purpose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert undetected_gpu(machine(tmp_path, ("0x10de", "0x030000"), driver="580.1")) is None


def test_amd_counts_where_it_only_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    assert undetected_gpu(machine(tmp_path / "laptop", ("0x1002", "0x030000"))) is None
    assert "built without ROCm" in str(undetected_gpu(machine(tmp_path / "server", ("0x1002", "0x120000"))))


def test_a_mac_without_metal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.sys, "platform", "darwin")
    monkeypatch.setattr(module.platform, "machine", lambda: "arm64")
    assert "macOS" in str(undetected_gpu(tmp_path))


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_here_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=f"device={name}: torch .* finds none here; it finds cpu"):
        pick_device(name)
    assert pick_device("auto").type == "cpu"


@pytest.mark.parametrize(
    ("capability", "built", "remedy"),
    [
        ((6, 0), ["sm_75", "sm_80", "sm_120"], "an older version of CUDA"),
        ((7, 0), ["sm_75", "sm_80", "sm_120"], "an older version of CUDA"),
        ((12, 0), ["sm_70", "sm_80", "sm_90a"], "that is newer"),
        ((8, 9), ["sm_75", "sm_80", "sm_120"], None),
        ((12, 0), ["sm_80", "compute_90"], None),
        ((9, 4), ["gfx90a", "gfx942"], None),
    ],
)
def test_a_gpu_that_this_build_of_torch_has_no_kernels_for(
    capability: tuple[int, int], built: list[str], remedy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    if remedy is None:
        assert pick_device("auto").type == pick_device("cuda").type == "cuda"
        return
    assert pick_device("auto").type == "cpu"
    number = f"{capability[0]}.{capability[1]}"
    with pytest.raises(ConfigError, match=rf"no kernels for Tesla X, compute capability {number}; .* {remedy}"):
        pick_device("cuda")
