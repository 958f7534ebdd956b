"""How the processes of a run differ: in the speed of their devices, and in the memory that they take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pretune.compute.hardware import measure_product
from pretune.core.units import memory
from pretune.parallel.processes import Processes
from pretune.run.config import RunConfig
from pretune.run.parts import Parts
from pretune.training.meter import peak_memory

SLOW = 0.75
"""Share of the fastest process's speed below which one holds up all others."""


def measured_speeds(config: RunConfig, parts: Parts, processes: Processes) -> list[float]:
    """FLOP/s of matrix products like the model's, in each process, all at the same time; none for one alone."""
    if processes.count == 1:
        return []
    model, precision = config.model, config.precision.activations
    return processes.gathered(measure_product(parts.device, precision, model.dim, model.mlp_dim))


def said_of_speeds(speeds: list[float]) -> Iterator[str]:
    """A line on the speeds of several processes, and one for each that the others will wait for."""
    if not speeds:
        return
    yield f"each process multiplies matrices at {min(speeds) / 1e9:,.0f} to {max(speeds) / 1e9:,.0f} GFLOP/s"
    for rank, speed in enumerate(speeds):
        if speed < SLOW * max(speeds):
            yield (
                f"warning: rank {rank} has {speed / max(speeds):.0%} of the fastest one's speed, and all wait for it: "
                "look at what else runs on its device"
            )


def in_summary(parts: Parts, processes: Processes, speeds: list[float]) -> dict[str, Any]:
    """Peak memory: the largest of all processes; for several also the smallest, and the extremes of their speeds."""
    own = peak_memory(parts.device)
    if processes.count == 1 or own is None:
        return {"peak_memory_bytes": own}
    found = processes.gathered(own)
    return {
        "peak_memory_bytes": max(found),
        "smallest_peak_memory_bytes": min(found),
        "processes": processes.count,
        "matmul_flops": [min(speeds), max(speeds)],
    }


def said_of_memory(summary: dict[str, Any]) -> Iterator[str]:
    """A line on the memory that several processes have taken."""
    if "processes" in summary:
        least, most = summary["smallest_peak_memory_bytes"], summary["peak_memory_bytes"]
        yield f"peak memory of the {summary['processes']} processes: {memory(least)} to {memory(most)}"
