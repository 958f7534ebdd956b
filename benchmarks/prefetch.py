"""Claim: a training step takes no longer with batches that are copied ahead than with a batch that is on the device.

    python benchmarks/prefetch.py [tiny|nano|14m|180m] [--device cpu|cuda] [--bursts 5] [--seconds 2]

The same compiled step gets its batches in three ways, which take turns: `there`: one batch that stays on the device;
`prefetched`: each is read, pinned and copied on a separate stream while the step before it runs, as in training;
`copied`: each is read and copied when its step begins. Figures are milliseconds per step, the median over the bursts.
On a CPU nothing is copied, so that there is nothing to gain.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from side_by_side import medians, show
from throughput import DTYPES, SHAPES, fastest, pretune_side

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from pretune.core.batch import Batch
from pretune.training.prefetch import Prefetcher

NUM_BATCHES = 64
Source = Callable[[int], Batch]
"""The batch of a step, by its number, on the device."""


def main() -> None:
    """Measure the three ways; print a line for each burst, a table, and the claim last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", choices=SHAPES, help="nano; on CUDA 14m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bursts", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a burst")
    options = parser.parse_args()
    shape = options.shape or ("14m" if options.device == "cuda" else "nano")
    step, ways = training_step(shape, options.device), sources(shape, torch.device(options.device))
    results: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for source in ways.values():
        milliseconds(step, source, 0.0)  # compiles at the first call
    for _ in range(options.bursts):
        for way, source in ways.items():
            results[way].append({"milliseconds": milliseconds(step, source, options.seconds)})
            print(json.dumps({"side": way, "shape": shape, **results[way][-1]}), flush=True)
    median = medians(results)
    show(f"{shape} on {options.device}: a training step by where its batch comes from", median)
    ratio = round(median["prefetched"]["milliseconds"] / median["there"]["milliseconds"], 3)
    claim = f"training step ({shape}, {options.device}) with prefetched batches takes at most 1.02 times as long"
    print(json.dumps({"claim": f"{claim} as with one that is there", "ratio": ratio, "holds": ratio <= 1.02, **median}))


def training_step(shape: str, device: str) -> Callable[[Batch], None]:
    """A step as in throughput.py, in the precision that the device does fast."""
    model, loss_of = pretune_side(SHAPES[shape], device)
    dtype = DTYPES[fastest(device, SHAPES[shape])]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(batch: Batch) -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = loss_of(batch.inputs, batch.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sources(shape: str, device: torch.device) -> dict[str, Source]:
    """The three ways, on the same random tokens."""
    rows, length = SHAPES[shape].micro_batch, SHAPES[shape].sequence_length
    tokens = torch.randint(0, SHAPES[shape].vocab_size, (NUM_BATCHES * rows, length + 1))

    def read(position: int, num_sequences: int) -> Batch:
        part = tokens[position % len(tokens) :][:num_sequences]
        return Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), None)

    there, feed = read(0, rows).to(device), Prefetcher(read, Batch.num_scored, device)
    return {
        "there": lambda number: there,
        "prefetched": lambda number: feed.batch(number * rows, rows).batch,
        "copied": lambda number: read(number * rows, rows).to(device),
    }


def milliseconds(step: Callable[[Batch], None], source: Source, seconds: float) -> float:
    """Time of a step, from as many as take about `seconds`: the device is waited for at their end alone."""

    def run(first: int, num_steps: int) -> float:
        started = time.perf_counter()
        for number in range(first, first + num_steps):
            step(source(number))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / num_steps

    run(0, 1)
    once = run(1, 2)
    return round(1e3 * run(3, max(int(seconds / once), 1)), 3)


if __name__ == "__main__":
    main()
