"""Claim: collectives take the time that task=plan predicts from what each process sends.

Processes of this machine, joined by gloo, reduce, gather and scatter tensors of several sizes. The bandwidth and the
latency of the link are those of two processes, by least squares over the all-reduces; everything else is predicted
with them: the other collectives, and more processes. On few cores, processes also share the cores that copy the bytes:
so the bandwidth of n processes is taken as 2 / n of that of two, where there are fewer cores than processes.

    python benchmarks/interconnect.py [--processes 2 3 4] [--mib 1 4 16 64] [--repeats 5]

Prints a line of JSON per case; the last one has `ratio`, measured over predicted, of each collective: the median, the
least and the greatest. gloo's reduce-scatter is an all-reduce of which it keeps a part: expect twice the prediction.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

KINDS = ("all_reduce", "all_gather", "reduce_scatter")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--mib", type=float, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    measured = {count: seconds(count, args.mib, args.repeats) for count in sorted({2, *args.processes})}
    sent = [moved("all_reduce", 2, mib) for mib in args.mib]
    latency, per_byte = fitted(sent, [measured[2]["all_reduce", mib] for mib in args.mib])
    ratios: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for count, found in measured.items():
        crowded = max(count / max(os.cpu_count() or 1, 2), 1.0)
        for (kind, mib), took in found.items():
            predicted = latency * math.ceil(math.log2(count)) + per_byte * crowded * moved(kind, count, mib)
            if (count, kind) != (2, "all_reduce"):
                ratios[kind].append(took / predicted)
            print(
                json.dumps(
                    {"processes": count, "collective": kind, "mib": mib, "ms": round(1000 * took, 3),
                     "predicted_ms": round(1000 * predicted, 3)}
                ),
                flush=True,
            )  # fmt: skip
    print(
        json.dumps(
            {
                "claim": "collectives take the time that is predicted from what each process sends",
                "ratio": {kind: _spread(found) for kind, found in ratios.items() if found},
                "gigabytes_per_second": round(1e-9 / per_byte, 3),
                "latency_us": round(1e6 * latency, 1),
                "cores": os.cpu_count(),
            }
        )
    )  # fmt: skip


def _spread(ratios: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(ratios), 2),
        "least": round(min(ratios), 2),
        "greatest": round(max(ratios), 2),
    }


def moved(kind: str, count: int, mib: float) -> float:
    """Bytes that each of `count` processes sends, where `mib` is the size of the whole tensor."""
    whole = (count - 1) / count * mib * 2**20
    return 2 * whole if kind == "all_reduce" else whole


def fitted(sent: list[float], took: list[float]) -> tuple[float, float]:
    """Latency and seconds per byte, by least squares on relative errors; neither is negative."""
    rows = torch.tensor([[1 / t, s / t] for s, t in zip(sent, took, strict=True)], dtype=torch.float64)
    latency, per_byte = torch.linalg.lstsq(rows, torch.ones(len(took), 1, dtype=torch.float64)).solution[:, 0].tolist()
    if latency < 0 or len(took) < 2:
        return 0.0, statistics.median(t / s for s, t in zip(sent, took, strict=True))
    return latency, per_byte


def seconds(count: int, sizes: list[float], repeats: int) -> dict[tuple[str, float], float]:
    """The median time of each collective, on the slowest process."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        given = (count, sizes, repeats, folder)
        started = [context.Process(target=_work, args=(rank, *given)) for rank in range(count)]
        for process in started:
            process.start()
        for process in started:
            process.join()
            assert process.exitcode == 0
        return {(kind, mib): took for kind, mib, took in json.loads((Path(folder) / "found.json").read_text())}


def _work(rank: int, count: int, sizes: list[float], repeats: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    found = []
    for mib in sizes:
        part = max(round(mib * 2**18 / count), 1)
        whole, own = torch.ones(part * count), torch.ones(part)
        works: dict[str, Callable[[], object]] = {
            "all_reduce": lambda whole=whole: dist.all_reduce(whole),
            "all_gather": lambda whole=whole, own=own: dist.all_gather([*whole.chunk(count)], own),
            "reduce_scatter": lambda whole=whole, own=own: dist.reduce_scatter(own, [*whole.chunk(count)]),
        }
        for kind, work in works.items():
            took = torch.zeros(repeats)
            for index in range(-1, repeats):
                dist.barrier()
                started = time.perf_counter()
                work()
                if index >= 0:
                    took[index] = time.perf_counter() - started
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            found.append((kind, mib, float(took.median())))
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
