"""Claim: time-limited runs end within 1% of their budget, with the learning rate at its final value.

    python benchmarks/time_budget.py [--runs 10] [--seconds 6] [--micro_batch 8]

Runs smoke.yaml through the command line, with about fifty steps of 32 sequences. Evaluations and checkpoints on the way
do not count toward the time. Reports training seconds over the budget, and the last learning rate, which must be 0.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Train one run after the other; print a line for each, and the claim last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--micro_batch", type=int, default=8, help="sequences; divides 32")
    options = parser.parse_args()
    worst = highest_lr = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.runs):
            summary = trained(seed, options, Path(folder))
            off = summary["seconds"] / options.seconds - 1
            worst, highest_lr = max(worst, abs(off)), max(highest_lr, summary["train/lr"])
            print(json.dumps({"side": f"run {seed}", "steps": summary["step"], "off": round(off, 5)}))
    claim = "runs that go by the clock end within 1% of their time, with the learning rate at its final value"
    holds = worst <= 0.01 and highest_lr == 0
    print(json.dumps({"claim": claim, "ratio": round(1 + worst, 5), "holds": holds, "last_lr": highest_lr}))


def trained(seed: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The summary of one run."""
    budget = ["schedule=linear", "budget.steps=null", f"budget.time={options.seconds}"]
    batch = ["batch.tokens=4096", f"batch.micro_batch={options.micro_batch}", "evaluation.every=20"]
    command = [sys.executable, "src/main.py", "--config", "src/config/run/smoke.yaml", f"output_dir={folder}"]
    command += [f"name=run{seed}", f"seed={seed}", *budget, *batch, "samples.prompts=[]"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / f"run{seed}" / "summary.json").read_text())


if __name__ == "__main__":
    main()
