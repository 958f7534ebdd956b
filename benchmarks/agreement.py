"""Claim: 1, 2 and 4 processes train alike, by DDP and by FSDP2, with AdamW, Lion and Muon; a killed one ends all.

The run file `smoke` in float32, --steps steps of 4,096 tokens each, for each optimizer alone and in --processes
processes of each kind: the greatest difference of a training or validation loss from the run alone. Then one of two
processes is killed in the middle: seconds until none is left, and, once torchrun has started them again from the newest
checkpoint, the greatest difference of the final weights from those of a run that nobody disturbed.

    python benchmarks/agreement.py [--steps 50] [--processes 2 4] [--optimizers adamw lion muon] [--data 'a.jsonl.xz']
        [-- key=value ...]

Without --data, the texts are the documentation on this machine. Prints a line of JSON per comparison; the last one has
the greatest difference of all.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from processes import start
from studies import MAIN, RUN_FILES, command
from time_to_loss import data

SHAPE = (
    "model.num_layers=4", "model.dim=128", "model.num_heads=4", "model.num_kv_heads=2", "model.head_dim=32",
    "model.mlp_dim=352", "model.vocab_size=2048", "data.tokenizer.vocab_size=2048", "data.validation.fraction=0.0003",
)  # fmt: skip
LEARNING_RATES = {"adamw": "1e-3", "lion": "1e-4", "muon": "0.02"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--optimizers", nargs="+", default=[*LEARNING_RATES], choices=[*LEARNING_RATES])
    parser.add_argument("--data")
    parser.add_argument("--validation")
    parser.add_argument("overrides", nargs="*", help="after `--`: keys for every run")
    args = parser.parse_args()
    greatest = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder, given = Path(name), [*data(args), *args.overrides]
        for optimizer in args.optimizers:
            alone = trained(folder, overrides(f"{optimizer}-alone", name, args.steps, optimizer, given), 1)
            for kind in ("ddp", "fsdp"):
                for count in args.processes:
                    keys = overrides(f"{optimizer}-{kind}{count}", name, args.steps, optimizer, given)
                    found = difference(alone, trained(folder, [*keys, f"parallel={kind}"], count))
                    greatest = max(greatest, found)
                    print(
                        json.dumps({"optimizer": optimizer, "kind": kind, "processes": count, "difference": found}),
                        flush=True,
                    )
        killed = after_a_kill(folder, args.steps, given)
        print(json.dumps(killed), flush=True)
    print(
        json.dumps(
            {
                "claim": "1, 2 and 4 processes train alike, by DDP and by FSDP2; a killed one ends all within 10 s",
                "greatest_difference": greatest,
                **killed,
                "steps": args.steps,
            }
        )
    )


def overrides(name: str, folder: str, steps: int, optimizer: str, more: list[str]) -> list[str]:
    """The keys of one run."""
    return [
        f"name={name}", f"output_dir={folder}", *SHAPE, "data.sequence_length=256", "batch.tokens=4096",
        "batch.micro_batch=2", "precision=fp32", "precision.compile=false", f"budget={{steps: {steps}, time: null}}",
        f"optimizer={optimizer}", f"optimizer.lr={LEARNING_RATES[optimizer]}", "log_every=1",
        f"evaluation.every={max(steps // 2, 1)}", f"checkpoint.every={max(steps // 4, 1)}", "samples.prompts=[]",
        "report.after_training=false", *more,
    ]  # fmt: skip


def trained(folder: Path, keys: list[str], processes: int) -> Path:
    """Train a run, if it is not there yet; return its folder."""
    name = keys[0].partition("=")[2]
    words = [*start(processes), MAIN, "--config", str(RUN_FILES / "smoke.yaml"), *keys]
    command(words, folder / f"{name}.log")
    return folder / name


def difference(one: Path, other: Path) -> float:
    """The greatest difference of a loss in two runs' metrics."""
    ours, theirs = losses(one), losses(other)
    assert ours.keys() == theirs.keys()
    return max(abs(ours[key] - theirs[key]) for key in ours)


def losses(folder: Path) -> dict[tuple[int, str], float]:
    """Training and validation losses by step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(row["step"], key): row[key] for row in rows for key in ("train/loss", "val/loss") if key in row}


def after_a_kill(folder: Path, steps: int, given: list[str]) -> dict[str, float]:
    """Seconds from the death of one of two processes until all are gone, and how far the weights of the run that goes
    on are from those of one that was not disturbed."""
    whole = trained(folder, overrides("undisturbed", str(folder), steps, "adamw", given), 2)
    keys = overrides("killed", str(folder), steps, "adamw", given)
    words = [sys.executable, *start(2), MAIN, "--config", str(RUN_FILES / "smoke.yaml"), *keys]
    with (folder / "killed.log").open("w") as log:
        first = subprocess.Popen(words, stdout=log, stderr=log, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        metrics = folder / "killed" / "metrics.jsonl"
        while not (metrics.is_file() and len(metrics.read_text().splitlines()) > steps // 2):
            assert first.poll() is None, (folder / "killed.log").read_text()
            time.sleep(0.05)
        victim = children(first.pid)[-1]
        os.kill(victim, signal.SIGKILL)
        killed = time.perf_counter()
        first.wait()
        took = time.perf_counter() - killed
    trained(folder, keys, 2)
    weights = [
        load_file(next((run / "checkpoints").glob(f"step_{steps:08d}/model.safetensors")))
        for run in (whole, folder / "killed")
    ]
    apart = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])
    return {"seconds_until_all_are_gone": round(took, 2), "weights_apart": apart}


def children(pid: int) -> list[int]:
    """The processes that a process of Linux has started, in their order."""
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
