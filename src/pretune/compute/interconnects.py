"""What joins devices, by name: bandwidth and latency of collectives, from datasheets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Interconnect = Literal["nvlink3", "nvlink4", "nvlink5", "pcie4", "ib400", "ib200", "eth100", "eth10"]

ACHIEVED = 0.8
"""Share of a link's rate that large collectives reach: nccl-tests on machines of eight H100s report about 370 of 450
GB/s for an all-reduce."""


@dataclass(frozen=True)
class Link:
    """bandwidth: bytes/s, in one direction, that each of a machine's eight devices has for collectives with all others.
    hop: seconds of latency that each doubling of the number of devices adds. source: where the figures come from."""

    bandwidth: float
    hop: float
    source: str

    def seconds(self, moved: float, collectives: int, devices: int) -> float:
        """Time of collectives of so many devices, each of which sends `moved` bytes in all of them together."""
        if devices == 1 or collectives == 0:
            return 0.0
        return moved / (ACHIEVED * self.bandwidth) + collectives * self.hop * math.ceil(math.log2(devices))


# Between machines, a collective's rings leave a machine by all of its adapters at once: what all of them carry
# together is what each device has (NCCL's "bus bandwidth").
LINKS: dict[str, Link] = {
    "nvlink3": Link(300e9, 5e-6, "NVIDIA A100 datasheet: 600 GB/s in both directions"),
    "nvlink4": Link(450e9, 5e-6, "NVIDIA H100 datasheet: 900 GB/s in both directions"),
    "nvlink5": Link(900e9, 5e-6, "NVIDIA B200 datasheet: 1.8 TB/s in both directions"),
    "pcie4": Link(16e9, 10e-6, "PCI Express 4.0 x16: 32 GB/s, which two neighbours in a ring share"),
    "ib400": Link(400e9, 10e-6, "eight adapters of 400 Gbit/s in a machine (InfiniBand NDR)"),
    "ib200": Link(200e9, 10e-6, "eight adapters of 200 Gbit/s in a machine (InfiniBand HDR)"),
    "eth100": Link(12.5e9, 30e-6, "one adapter of 100 Gbit/s in a machine"),
    "eth10": Link(1.25e9, 50e-6, "one adapter of 10 Gbit/s in a machine"),
}
