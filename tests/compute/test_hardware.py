"""The device table, and what is measured for a device that is not in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretune.compute import devices, hardware
from pretune.core.config import ConfigError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("reported", "name", "tflops"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40gb", 312),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb", 312),
        ("NVIDIA H100 80GB HBM3", "h100", 989.4),
        ("NVIDIA H200", "h200", 989.4),
        ("NVIDIA GeForce RTX 3090", "rtx-3090", 71),
        ("NVIDIA GeForce RTX 4090", "rtx-4090", 165.2),
        ("NVIDIA L4", "l4", 121),
        ("NVIDIA L40S", "l40s", 362.05),
        ("NVIDIA A10G", "a10g", 70),
        ("NVIDIA A30", "a30", 165),
        ("NVIDIA GH200 480GB", "gh200", 989.4),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada", 364.25),
        ("Tesla T4", "t4", 65),
        ("Tesla V100-SXM2-16GB", "v100-16gb", 125),
    ],
)
def test_a_device_is_found_by_what_torch_calls_it(reported: str, name: str, tflops: float) -> None:
    device = devices.by_reported_name(reported)
    assert device is not None
    assert device.name == name
    assert device.peak_flops == tflops * 1e12


@pytest.mark.parametrize(
    "reported", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H20", "nvidia l4"]
)
def test_a_device_that_only_sounds_alike_is_not_in_the_table(reported: str) -> None:
    assert devices.by_reported_name(reported) is None


def test_no_two_devices_share_a_name() -> None:
    names = [device.name for device in devices.DEVICES]
    reported = [name for device in devices.DEVICES for name in device.reported]
    assert len(set(names)) == len(names)
    assert len(set(reported)) == len(reported)
    assert set(devices.ALIASES.values()) <= set(names)


@pytest.mark.parametrize(
    ("name", "expected"), [("gh200", True), ("rtx-6000-ada", True), ("a10g", False), ("a30", False)]
)
def test_8_bits_came_with_ada_and_hopper(name: str, expected: bool) -> None:
    assert devices.named(name).has_float8 == expected


def test_figures_are_in_the_units_that_they_claim() -> None:
    for device in devices.DEVICES:
        assert 1e13 < device.peak_flops < 3e15
        assert 2**33 < device.memory < 2**38
        assert 2e11 < device.bandwidth < 1e13
        assert device.source


@pytest.mark.parametrize("name", ["a100-40gb", "A100 40GB", "a100_40gb", "NVIDIA A100-SXM4-40GB", "a100"])
def test_a_device_is_named_in_any_spelling(name: str) -> None:
    assert devices.named(name).name == "a100-40gb"


def test_an_unknown_device_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown device 'a100-40g'; did you mean 'a100-40gb'"):
        devices.named("a100-40g")


def test_a_device_at_hand_is_measured() -> None:
    device = hardware.local_device(CPU, ["float32"])
    assert device.name == "cpu"
    assert "measured" in device.source
    assert device.peak_flops > 1e8
    assert device.bandwidth > 1e7
    assert device.memory > 2**20


def test_measuring_leaves_the_random_generator_alone() -> None:
    before = torch.get_rng_state()
    hardware.local_device(CPU, ["float32", "bfloat16"])
    hardware.measure_product(CPU, "float16", 64, 128)
    assert torch.equal(before, torch.get_rng_state())


def test_a_known_gpu_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    cuda = torch.device("cuda")
    assert hardware.peak_flops(cuda, ["float32"], lambda device, precision: 1.0) == 312e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce GTX 1080")
    assert hardware.peak_flops(cuda, ["float32"], lambda device, precision: 1.0) == 1.0


def test_the_peak_is_that_of_the_fastest_arithmetic() -> None:
    def rate(device: torch.device, precision: str) -> float:
        return {"float32": 2.0, "bfloat16": 7.0, "float16": 3.0}[precision]

    assert hardware.peak_flops(CPU, ["float32", "bfloat16"], rate) == 7.0
    assert hardware.peak_flops(CPU, ["float32", "float16"], rate) == 3.0


def test_start_up_is_not_measured() -> None:
    # The first product of a process takes as long as it takes to load a library.
    calls = []

    def seconds(device: torch.device, precision: str, shape: tuple[int, int, int], seconds: float) -> float:
        calls.append(shape)
        return 1.0 if len(calls) == 1 else 2 * shape[0] ** 3 / 1e12

    assert hardware.measure_matmul(CPU, "float32", seconds) == pytest.approx(1e12)


def host(root: Path, available_kib: int, limit: str, used: int, cache: int) -> Path:
    group = root / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:   {available_kib} kB\n")
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")
    return root


@pytest.mark.parametrize(("limit", "expected"), [("max", 8000 * 1024), ("5000", 5000 - 3000 + 500), ("2000", 0)])
def test_host_memory_is_what_is_left_within_the_limit(tmp_path: Path, limit: str, expected: int) -> None:
    assert hardware.available_host_memory(host(tmp_path, 8000, limit, 3000, 500)) == expected


def test_host_memory_without_linux_is_all_there_is(tmp_path: Path) -> None:
    assert hardware.available_host_memory(tmp_path) > 2**28


def test_a_device_keeps_something_for_itself() -> None:
    """A CPU's C library more than a GPU: it keeps pieces of what was freed."""
    assert 1.9 * hardware.usable(40 * 2**30, "cpu") < 40 * 2**30
    assert hardware.usable(40 * 2**30, "cpu") < hardware.usable(40 * 2**30, "cuda") < 40 * 2**30
