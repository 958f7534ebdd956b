"""Claim: two processes on two cores train at least 0.85 times as fast as one process with two threads.

Both sides train the same model (nano, compiled) on the same batches in turns, --seconds of training time each, and both
have all cores: --processes with a share of the threads each, or one with all of them. On GPUs, a process alone has one.

    python benchmarks/processes.py [--processes 2] [--seconds 30] [--turns 3] [--data 'a.jsonl.xz'] [-- key=value ...]

Without --data, the texts are the documentation on this machine. Prints a line of JSON per run; the last one has
`ratio`, the median speed of several processes over that of one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

from studies import MAIN, RUN_FILES, command
from time_to_loss import data

NANO = (
    "model.num_layers=4", "model.dim=256", "model.num_heads=4", "model.num_kv_heads=4", "model.head_dim=64",
    "model.mlp_dim=704", "model.vocab_size=4096", "data.tokenizer.vocab_size=4096",
)  # fmt: skip
"""The sizes of nano.yaml, in place of those of the run file."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--data")
    parser.add_argument("--validation")
    parser.add_argument("overrides", nargs="*", help="after `--`: keys for every run")
    args = parser.parse_args()
    sides: dict[int, list[float]] = {1: [], args.processes: []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.turns):
            for processes, speeds in sides.items():
                name = f"of-{processes}-turn-{turn}"
                given = overrides(name, folder, args.seconds, [*data(args), *args.overrides])
                words = [*start(processes), MAIN, "--config", str(RUN_FILES / "smoke.yaml"), *given]
                command(words, Path(folder) / f"{name}.log")
                summary = json.loads((Path(folder) / name / "summary.json").read_text())
                speeds.append(summary["tokens"] / summary["seconds"])
                print(json.dumps({"processes": processes, "tokens_per_second": round(speeds[-1])}), flush=True)
    medians = {processes: statistics.median(speeds) for processes, speeds in sides.items()}
    print(
        json.dumps(
            {
                "claim": f"{args.processes} processes train at least 0.85 times as fast as one on the same cores",
                "ratio": round(medians[args.processes] / medians[1], 3),
                "tokens_per_second": {str(key): round(value) for key, value in medians.items()},
                "cores": os.cpu_count(),
            }
        )
    )


def start(processes: int) -> list[str]:
    """What comes before the program in the command of Python."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return several if processes > 1 else []


def overrides(name: str, folder: str, seconds: float, more: list[str]) -> list[str]:
    """The keys of one run."""
    return [
        f"name={name}", f"output_dir={folder}", *NANO, "data.sequence_length=256", "batch.tokens=8192",
        "batch.micro_batch=8", "precision.compile=true", f"budget={{steps: null, time: {seconds}}}", "log_every=10",
        "evaluation.every=null", "evaluation.at_start=false", "checkpoint.every=null", "samples.prompts=[]",
        "report.after_training=false", *more,
    ]  # fmt: skip


if __name__ == "__main__":
    main()
