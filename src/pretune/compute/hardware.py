"""Measure the local device: memory, bandwidth, and the speed of matrix products in each precision."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pretune.compute.config import Activations
from pretune.compute.devices import Device, by_reported_name
from pretune.compute.precision import dtype_of

if TYPE_CHECKING:
    import torch

RUNTIME_BYTES = 640 * 2**20
"""GPU memory that CUDA uses before the first tensor (context, kernels, cuBLAS workspaces): half a GiB or a little more
on recent drivers. A rule of thumb, not a measurement."""

_MEASURE_SECONDS = 0.5
_SLOW = 0.02
"""If the first product takes longer than this many seconds, no more are timed: the precision has no native instructions
and repeating would take too long."""


def device_name(device: torch.device) -> str:
    """torch's name of a GPU; `cpu` or `mps` for other devices."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def total_memory(device: torch.device) -> int:
    """The maximum number of bytes that a process can use on the device; on a CPU, the memory available now."""
    import torch

    match device.type:
        case "cuda":
            return torch.cuda.get_device_properties(device).total_memory
        case "mps":
            return torch.mps.recommended_max_memory()
        case _:
            return available_host_memory(Path("/"))


def available_host_memory(root: Path) -> int:
    """Bytes of host memory that this process can still get without swapping, within its control group's limit.

    `root` is the folder that contains proc/ and sys/; without them (macOS), this is all physical memory.
    """
    found = []
    for line in system_file(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    limit, used = (system_file(root / "sys/fs/cgroup" / name).strip() for name in ("memory.max", "memory.current"))
    if limit.isdigit() and used.isdigit():
        # The control group counts file cache as used, although the kernel frees it on demand.
        cache = dict(line.split() for line in system_file(root / "sys/fs/cgroup/memory.stat").splitlines())
        found.append(int(limit) - int(used) + int(cache.get("inactive_file", 0)))
    return max(min(found), 0) if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def usable(memory: int, kind: str) -> int:
    """Bytes of `memory` that tensors can use: without CUDA's overhead, and with 5% reserved for fragmentation.

    On a CPU, half: the C library keeps pieces of what a step frees, and processes were measured to take 1.4 to 1.9
    times as much as their tensors.
    """
    return memory // 2 if kind == "cpu" else int((memory - RUNTIME_BYTES) * 0.95)


def _fastest(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Time of the fastest call, after one warm-up call, repeated for about `seconds`."""
    import torch

    def once() -> float:
        started = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - started

    once()
    started, best = time.perf_counter(), once()
    while time.perf_counter() - started < seconds:
        best = min(best, once())
    return best


def _seconds_of(device: torch.device, precision: Activations, shape: tuple[int, int, int], seconds: float) -> float:
    """Time of the fastest product of matrices [m, k] and [k, n], repeated for `seconds`."""
    import torch

    rows, inner, columns = shape
    # A separate generator, so that a run's dropout does not depend on these measurements. Random, as zeros are faster.
    generator = torch.Generator(device).manual_seed(0)
    dtype = dtype_of(precision)
    a = torch.randn(rows, inner, device=device, generator=generator).to(dtype)
    b = torch.randn(inner, columns, device=device, generator=generator).to(dtype)
    return _fastest(lambda: a @ b, device, seconds)


def measure_matmul(
    device: torch.device,
    precision: Activations,
    seconds_of: Callable[[torch.device, Activations, tuple[int, int, int], float], float] = _seconds_of,
) -> float:
    """FLOP/s of the fastest square matrix product found in about half a second, with doubling sizes."""
    # Warm up: the first product includes creating a context, loading a library and choosing kernels.
    seconds_of(device, precision, (64, 64, 64), 0.0)
    best, size, started = 0.0, 256, time.perf_counter()
    while size <= 8192:
        best = max(best, 2 * size**3 / seconds_of(device, precision, (size, size, size), _MEASURE_SECONDS / 8))
        size *= 2
        # Stop if two products of the next size, at the best rate so far, would exceed the remaining time.
        if time.perf_counter() - started + 4 * size**3 / best > _MEASURE_SECONDS:
            break
    return best


def measure_product(device: torch.device, precision: Activations, inputs: int, outputs: int) -> float:
    """FLOP/s of a product like those of a layer from `inputs` to `outputs` features; well under a second, even in an
    precision that the device has no instructions for."""
    work = 5e7 if device.type == "cpu" else 2e10
    tokens = min(max(int(work / (2 * inputs * outputs)), 16), 8192)
    shape = tokens, inputs, outputs
    once = _seconds_of(device, precision, shape, 0.0)
    seconds = once if once > _SLOW else _seconds_of(device, precision, shape, 0.05)
    return 2 * tokens * inputs * outputs / seconds


def measure_bandwidth(device: torch.device) -> float:
    """Bytes/s of a copy within the device's memory, counting both reads and writes."""
    import torch

    source = torch.ones(2**25, device=device)  # 128 MiB: larger than any cache
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device, 0.15)


def measure_peak(
    device: torch.device,
    precisions: Iterable[Activations],
    rate: Callable[[torch.device, Activations], float] = measure_matmul,
) -> float:
    """FLOP/s of the fastest square matrix product in any of these precisions."""
    return max(rate(device, precision) for precision in precisions)


def local_device(device: torch.device, precisions: Iterable[Activations]) -> Device:
    """The local device: from the table if it is known, else measured in these precisions, which takes a second."""
    name, memory = device_name(device), total_memory(device)
    known = by_reported_name(name)
    if known is not None:
        return dataclasses.replace(known, memory=memory)
    bandwidth = measure_bandwidth(device)
    peak = measure_peak(device, precisions)
    return Device(name, peak, memory, bandwidth, (name,), "measured: fastest matrix product, and copy")


def peak_flops(
    device: torch.device,
    precisions: Iterable[Activations],
    rate: Callable[[torch.device, Activations], float] = measure_matmul,
) -> float:
    """The peak FLOP/s on which `train/mfu` is based: the table's dense 16-bit peak or, for a device that is not in the
    table, the fastest matrix product measured in these precisions, with torch's current number of threads. It is
    measured once per process."""
    import torch

    known = by_reported_name(device_name(device))
    if known is not None:
        return known.peak_flops
    return _measured_peak(device, frozenset(precisions), rate, torch.get_num_threads())


@functools.cache
def _measured_peak(
    device: torch.device,
    precisions: frozenset[Activations],
    rate: Callable[[torch.device, Activations], float],
    num_threads: int,
) -> float:
    return measure_peak(device, precisions, rate)


def system_file(path: Path) -> str:
    """The content of a file in /proc or /sys; empty if it does not exist."""
    try:
        return path.read_text()
    except OSError:
        return ""
