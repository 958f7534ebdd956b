"""Shared by the scripts: Llama models by size, sides as processes that take turns, the memory of a process, a table of
the figures.

On its own it measures nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

Figures = dict[str, float]


def llama(**settings: Any) -> Any:
    """The configuration of a Llama model with heads of 64: its sizes, and what else it has of its own."""
    from omegaconf import OmegaConf

    from pretune.core.config import validate
    from pretune.launch.groups import CONFIGS
    from pretune.model.config import ModelConfig

    common: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "model" / "common" / "llama.yaml"))
    return validate(ModelConfig, {"head_dim": 64, **common, **settings})


def take_turns(
    script: str, sides: Sequence[str], shape: str, args: argparse.Namespace, more: Sequence[str] = ()
) -> dict[str, list[Figures]]:
    """Figures of `args.bursts` bursts of each side. A side is a process of `script`, called with `shape` and `more`.
    It prints "ready"; then, for each number of seconds on its standard input, it prints a line of figures. The other
    sides wait meanwhile."""
    workers = {side: start([script, shape, *more], side, args.device, args.threads) for side in sides}
    results: dict[str, list[Figures]] = {side: [] for side in sides}
    for _ in range(args.bursts):
        for side, worker in workers.items():
            results[side].append(ask(worker, args.seconds))
            print(json.dumps({"side": side, "shape": shape, **results[side][-1]}), flush=True)
    for worker in workers.values():
        worker.communicate()
    return results


def start(script: Sequence[str], side: str, device: str, threads: int) -> subprocess.Popen[str]:
    """A process that has compiled and warmed up its side."""
    command = [sys.executable, *script, "--device", device, "--threads", str(threads), "--side", side]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    if worker.stdout.readline().strip() != "ready":
        sys.exit(f"{side} did not start; run `{' '.join(command)}` to see why")
    return worker


def ask(worker: subprocess.Popen[str], seconds: float) -> Figures:
    """The figures of one burst."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    print(seconds, file=worker.stdin, flush=True)
    return json.loads(worker.stdout.readline())


def medians(results: Mapping[str, list[Figures]]) -> dict[str, Figures]:
    """Each side's figures: the median over its bursts."""
    return {
        side: {figure: statistics.median(burst[figure] for burst in bursts) for figure in bursts[0]}
        for side, bursts in results.items()
    }


def reset_peak_memory(device: str) -> int:
    """Reset the peak, between two steps, and return the bytes in use now."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark of resident memory
    return _status("VmRSS")


def peak_memory(device: str) -> int:
    """Peak bytes in use since then."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    """A value of /proc/self/status, in bytes."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def show(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Print figures as a table: a row for each side, bytes in MiB."""
    columns = list(dict.fromkeys(figure for figures in rows.values() for figure in figures))
    table = Table("side", title=title, title_justify="left")
    for column in columns:
        table.add_column(column.replace("_bytes", " (MiB)").replace("_", " "), justify="right")
    for side, figures in rows.items():
        table.add_row(side, *(_text(column, figures.get(column)) for column in columns))
    Console(width=140).print(table)


def _text(column: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return "" if value is None else str(value)
    return (
        f"{value / 2**20:,.1f}" if column.endswith("_bytes") else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
    )
