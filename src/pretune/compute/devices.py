"""GPUs by name: peak FLOP/s, memory and bandwidth, from their datasheets."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from pretune.core.config import ConfigError, nearest

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """peak_flops: FLOP/s of dense 16-bit matrix products (bfloat16, or float16 on devices without it; if measured, in
    the fastest precision). memory: bytes that a process may use. bandwidth: bytes/s between memory and chip. reported:
    names that `torch.cuda.get_device_name` returns for it. source: where the figures come from."""

    name: str
    peak_flops: float
    memory: int
    bandwidth: float
    reported: tuple[str, ...]
    source: str
    has_bfloat16: bool = True

    @property
    def has_float8(self) -> bool:
        """Whether it supports 8-bit matrix products: Ada, Hopper and Blackwell do."""
        return self.name in _WITH_FLOAT8


def _gpu(
    name: str, tflops: float, gib: float, gb_per_second: float, reported: str, source: str, bf16: bool = True
) -> Device:
    names = tuple(part.strip() for part in reported.split("|"))
    return Device(name, tflops * 1e12, int(gib * GIB), gb_per_second * 1e9, names, source, bf16)


# Peaks are for dense matrices: half of the datasheet's rate if that assumes 2:4 sparsity. GeForce peaks are for float32
# accumulation, which torch uses for bfloat16 matrix products. Memory is the total that CUDA reports (the figure in
# torch's out-of-memory messages), a little less than in the name; boards differ by about 0.3 GiB.
DEVICES: tuple[Device, ...] = (
    _gpu(
        "a100-40gb",
        312,
        39.4,
        1555,
        "NVIDIA A100-SXM4-40GB | NVIDIA A100-PCIE-40GB | A100-SXM4-40GB | A100-PCIE-40GB",
        "NVIDIA A100 datasheet",
    ),
    _gpu("a100-80gb", 312, 79.1, 2039, "NVIDIA A100-SXM4-80GB | A100-SXM4-80GB", "NVIDIA A100 datasheet, SXM"),
    _gpu("a100-80gb-pcie", 312, 79.1, 1935, "NVIDIA A100 80GB PCIe", "NVIDIA A100 datasheet, PCIe"),
    _gpu("h100", 989.4, 79.1, 3350, "NVIDIA H100 80GB HBM3", "NVIDIA H100 datasheet, SXM5"),
    _gpu("h100-pcie", 756, 79.1, 2000, "NVIDIA H100 PCIe", "NVIDIA H100 datasheet, PCIe"),
    _gpu("h100-nvl", 835.5, 93.0, 3900, "NVIDIA H100 NVL", "NVIDIA H100 datasheet, NVL"),
    _gpu("h200", 989.4, 139.7, 4800, "NVIDIA H200", "NVIDIA H200 datasheet, SXM"),
    _gpu("h200-nvl", 835.5, 139.7, 4800, "NVIDIA H200 NVL", "NVIDIA H200 datasheet, NVL"),
    _gpu("gh200", 989.4, 94.5, 4000, "NVIDIA GH200 480GB", "NVIDIA GH200 datasheet, 96 GB HBM3"),
    _gpu("b200", 2250, 178.3, 8000, "NVIDIA B200", "NVIDIA HGX B200 datasheet"),
    _gpu("l40s", 362.05, 44.4, 864, "NVIDIA L40S", "NVIDIA L40S datasheet"),
    _gpu("l40", 181.05, 44.4, 864, "NVIDIA L40", "NVIDIA L40 datasheet"),
    _gpu("l4", 121, 22.0, 300, "NVIDIA L4", "NVIDIA L4 datasheet (242 with sparsity)"),
    _gpu("a10", 125, 22.0, 600, "NVIDIA A10", "NVIDIA A10 datasheet"),
    _gpu("a10g", 70, 22.0, 600, "NVIDIA A10G", "NVIDIA A10G datasheet (140 with sparsity)"),
    _gpu("a30", 165, 23.5, 933, "NVIDIA A30", "NVIDIA A30 datasheet"),
    _gpu("a40", 149.7, 44.4, 696, "NVIDIA A40", "NVIDIA A40 datasheet"),
    _gpu("rtx-a6000", 154.8, 47.4, 768, "NVIDIA RTX A6000", "NVIDIA RTX A6000 datasheet (309.7 with sparsity)"),
    _gpu(
        "rtx-6000-ada",
        364.25,
        47.4,
        960,
        "NVIDIA RTX 6000 Ada Generation",
        "NVIDIA RTX 6000 Ada datasheet (728.5 with sparsity)",
    ),
    _gpu("rtx-3090", 71, 23.6, 936, "NVIDIA GeForce RTX 3090", "NVIDIA Ampere GA102 whitepaper, table 9"),
    _gpu("rtx-4090", 165.2, 23.6, 1008, "NVIDIA GeForce RTX 4090", "NVIDIA Ada whitepaper, appendix A"),
    _gpu("rtx-5090", 209.5, 31.3, 1792, "NVIDIA GeForce RTX 5090", "NVIDIA RTX Blackwell whitepaper, appendix A"),
    _gpu("t4", 65, 14.6, 320, "Tesla T4", "NVIDIA T4 datasheet (float16)", bf16=False),
    _gpu("p100", 18.7, 15.9, 732, "Tesla P100-PCIE-16GB", "NVIDIA P100 datasheet, PCIe (float16)", bf16=False),
    _gpu("v100-16gb", 125, 15.7, 900, "Tesla V100-SXM2-16GB", "NVIDIA V100 datasheet, SXM2 (float16)", bf16=False),
    _gpu("v100-32gb", 125, 31.7, 900, "Tesla V100-SXM2-32GB", "NVIDIA V100 datasheet, SXM2 (float16)", bf16=False),
    _gpu("v100-pcie-16gb", 112, 15.7, 900, "Tesla V100-PCIE-16GB", "NVIDIA V100 datasheet, PCIe (float16)", bf16=False),
)
_WITH_FLOAT8 = frozenset((
    "h100", "h100-pcie", "h100-nvl", "h200", "h200-nvl", "gh200", "b200",
    "l40s", "l40", "l4", "rtx-6000-ada", "rtx-4090", "rtx-5090",
))  # fmt: skip
ALIASES = {"a100": "a100-40gb", "v100": "v100-16gb", "h100-sxm": "h100", "3090": "rtx-3090", "4090": "rtx-4090"}


def named(name: str) -> Device:
    """The device with that name in the table; ConfigError, suggesting the nearest name, if there is none."""
    wanted = "-".join(name.lower().replace("_", "-").split())
    wanted = ALIASES.get(wanted, wanted)
    known = {device.name: device for device in DEVICES}
    by_report = {reported.lower(): device for device in DEVICES for reported in device.reported}
    found = known.get(wanted) or by_report.get(name.strip().lower())
    if found is None:
        raise ConfigError(
            f"unknown device '{name}'{nearest(wanted, known)}; known are {', '.join(known)}; null takes this machine's"
        )
    return found


def named_or_sized(name: str) -> Device:
    """The same, or for `16GiB` a GPU of which only the memory is known."""
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?gi?b", name.strip(), re.IGNORECASE)
    if size is None:
        return named(name)
    return Device(f"{size[1]}GiB", math.nan, int(float(size[1]) * GIB), math.nan, (), "its memory alone is known")


def by_reported_name(reported: str) -> Device | None:
    """The device that torch reports as `reported`, or None. Names must match fully: a laptop 4090 is not a 4090."""
    return next((device for device in DEVICES if reported in device.reported), None)
