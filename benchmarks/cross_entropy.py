"""The loss, from hidden states to gradients: ours, torch's own `linear_cross_entropy` (2.13 has it), and written out.

    python benchmarks/cross_entropy.py [--device cpu|cuda] [--rounds 5] [--shapes nano gpt2 ...]

Measures forward and backward of head and loss alone, in bf16, on random hidden states. The sides take turns. Times are
milliseconds of the fastest call, because other load on a machine only ever adds to it. Memory is the peak allocated on
top of the hidden states, the head and their gradients. If Liger's kernels are installed (liger-kernel, CUDA only), they
are one more side.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from memory import highest
from side_by_side import show

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from pretune.compute.compilation import keep_freed_memory
from pretune.objectives.cross_entropy import linear_cross_entropy

SHAPES = {"nano": (4096, 256, 4096), "14m": (4096, 384, 8192), "gpt2": (2048, 768, 50304)}
"""Positions, width, ids."""
CHUNK = 1024
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Summed loss of hidden states [N, D], a head [V, D] and targets [N]."""


def main() -> None:
    """Measure every side on every shape; print a line for each, a table per shape, and the claim last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    options = parser.parse_args()
    keep_freed_memory()
    ratios = {}
    for shape in options.shapes:
        results = compare(SHAPES[shape], options)
        for side, figures in results.items():
            print(json.dumps({"side": side, "shape": shape, **figures}), flush=True)
        show(f"{shape}: N, D, V = {SHAPES[shape]} on {options.device}", results)
        fastest = min(figures["milliseconds"] for side, figures in results.items() if side != "ours")
        ratios[shape] = round(results["ours"]["milliseconds"] / fastest, 3)
    claim = f"our loss ({options.device}) takes at most as long as the fastest of the others"
    print(json.dumps({"claim": claim, "ratio": max(ratios.values()), "holds": max(ratios.values()) <= 1, **ratios}))


def sides() -> dict[str, Loss]:
    """The sides that can be measured on this machine."""
    found: dict[str, Loss] = {
        "ours": torch.compile(
            lambda hidden, head, targets: linear_cross_entropy(hidden, head, targets, len(head), None, CHUNK)
        ),
        "written out": torch.compile(
            lambda hidden, head, targets: F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="sum")
        ),
    }
    if hasattr(F, "linear_cross_entropy"):
        # It ignores autocast, and torch.compile leaves its chunks uncompiled: so it is not compiled.
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch's, in chunks"] = lambda hidden, head, targets: F.linear_cross_entropy(
            hidden.bfloat16(), head.bfloat16(), targets, reduction="sum", options=options
        )
    if importlib.util.find_spec("liger_kernel") and torch.cuda.is_available():
        from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
            LigerFusedLinearCrossEntropyLoss,
        )

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        found["liger"] = lambda hidden, head, targets: liger(head, hidden, targets)
    return found


def compare(shape: tuple[int, int, int], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds, memory and loss of each side."""
    torch.compiler.reset()
    positions, dim, vocab = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, dim, generator=generator).to(options.device).requires_grad_()
    head = (torch.randn(vocab, dim, generator=generator) * 0.02).to(options.device).requires_grad_()
    targets = torch.randint(0, vocab, (positions,), generator=generator).to(options.device)
    found, times, results = sides(), {}, {}

    def once(loss_of: Loss) -> Tensor:
        hidden.grad = head.grad = None
        with torch.autocast(options.device, torch.bfloat16):
            loss = loss_of(hidden, head, targets)
        loss.backward()
        return loss.detach()

    for side, loss_of in found.items():
        loss = once(loss_of).item()
        results[side] = {
            "loss": round(loss / positions, 4),
            "work_bytes": work(lambda f=loss_of: once(f), options.device),
        }
    for _ in range(options.rounds):
        for side, loss_of in found.items():
            times.setdefault(side, []).append(milliseconds(lambda f=loss_of: once(f), options.device))
    # Hidden states and head have gradients at the end, on every side.
    gradients = hidden.nbytes + head.nbytes
    return {
        side: {"milliseconds": round(min(times[side]), 2), **figures, "work_bytes": figures["work_bytes"] - gradients}
        for side, figures in results.items()
    }


def milliseconds(call: Callable[[], Tensor], device: str) -> float:
    """Time of a call until its device has finished."""
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3


def work(call: Callable[[], Tensor], device: str) -> int:
    """Peak bytes that a call allocates, on top of what was allocated before."""
    if device == "cpu":
        return highest(call)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    main()
