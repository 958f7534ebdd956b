"""Claim: a model that learns from a teacher twice its size ends with fewer bits per byte than one trained plainly as
long.

One teacher (`budget_5m`, 4.5M parameters) trains for --teacher-seconds; its time counts on no side. Then each seed
trains the model of `distill_small` (2.2M) twice for --seconds of training time: plainly, and with the teacher beside
it, whose forward passes count. Same data, tokenizer, recipe, batches and machine, one run at a time. With --stored
there is a third side, whose teacher's outputs are computed before the clock starts (stage.objective.cached, top_k=32).

    python benchmarks/distillation.py [--seconds 60] [--teacher-seconds 240] [--seeds 3] [--stored] [--data
    'a.jsonl.xz']
        [--validation held_out.jsonl.xz] [--runs runs/distillation] [--loss alpha=0.9 ...] [-- key=value ...]

Without --data, the texts are the documentation on this machine. Runs are kept in --runs; an existing run is not
repeated. --loss sets keys of stage.objective, those after `--` apply to every run. Prints a line of JSON per run; the
last line has `ratio`, the mean over seeds of distilled over plain bits per byte, and both sides' means with their
standard deviations over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies import MAIN, RUN_FILES, command
from time_to_loss import data

TEACHER, MODEL = "budget_5m", "distill_small"
STORED = ("stage.objective.top_k=32", "stage.objective.cached=true")


@dataclass(frozen=True)
class Study:
    """Settings shared by all runs."""

    shared: list[str]
    folder: Path
    loss: tuple[str, ...] = ()
    """Keys of stage.objective of the distilled runs."""

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

    def of_teacher(self, seconds: float) -> list[str]:
        """Overrides of the teacher's run file."""
        return [*self._common("teacher", seconds, 1), *self.shared]

    def of_side(self, side: str, seconds: float, seed: int) -> list[str]:
        """Overrides of the model's run file: plain, distilled or stored."""
        common = [*self._common(f"{side}-seed{seed}", seconds, seed), *self.shared]
        if side == "plain":
            tokenizer = f"data.tokenizer.path={self.teacher / 'tokenizer'}"
            return [*common, "stage=pretrain", "~stage.objective.teacher", "data/tokenizer=file", tokenizer]
        inherited = "data/tokenizer=inherited"  # a set of data brings its own
        stored = STORED if side == "stored" else ()
        loss = [f"stage.objective.{key}" for key in self.loss]
        return [*common, inherited, f"stage.objective.teacher={self.teacher}", *stored, *loss]

    def run(self, recipe: str, overrides: list[str]) -> dict[str, Any]:
        """The summary of a run, which is trained first if it does not exist."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = overrides[0].partition("=")[2]
        command([MAIN, "--config", str(RUN_FILES / f"{recipe}.yaml"), *overrides], self.folder / f"{name}.log")
        summary = json.loads((self.folder / name / "summary.json").read_text())
        wanted = (
            "val/loss",
            "val/bits_per_byte",
            "val/divergence",
            "seconds",
            "step",
            "tokens",
            "parameters",
            "device",
        )
        figures = {"run": name, **{key: summary[key] for key in wanted if key in summary}}
        print(json.dumps(figures), flush=True)
        return figures

    def _common(self, name: str, seconds: float, seed: int) -> list[str]:
        keys = [f"name={name}", f"output_dir={self.folder}", f"budget={{time: {seconds}, count: []}}", f"seed={seed}"]
        return [*keys, "tracker=none", "evaluation.every=null", "samples.prompts=[]"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="training time of each model")
    parser.add_argument("--teacher-seconds", type=float, default=240.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stored", action="store_true", help="also a side with the teacher's outputs stored")
    parser.add_argument("--data", help="files to train on; the default needs no network")
    parser.add_argument("--validation", help="files to measure on, with --data")
    parser.add_argument("--runs", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--loss", nargs="*", default=[], metavar="KEY=VALUE", help="keys of stage.objective")
    parser.add_argument("overrides", nargs="*", help="after `--`: keys for every run")
    args = parser.parse_args()
    texts = ["data=python_docs"] if args.data is None else data(args)
    study = Study([*texts, *args.overrides], args.runs.resolve(), tuple(args.loss))
    teacher = study.run(TEACHER, study.of_teacher(args.teacher_seconds))
    sides = ["plain", "distilled", *(["stored"] if args.stored else [])]
    # Seed by seed, so that an interrupted measurement has every side once.
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for seed in range(1, args.seeds + 1):
        for side in sides:
            runs[side].append(study.run(MODEL, study.of_side(side, args.seconds, seed)))
    print(json.dumps({**compared(runs), "seconds": args.seconds, "teacher": teacher, "sides": runs}))


def compared(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The claim, the mean ratio of seeds of the same number, and each side's bits per byte."""
    bits = {side: [run["val/bits_per_byte"] for run in found] for side, found in runs.items()}
    return {
        "claim": f"{MODEL} learns more from text and teacher than from text in the same time",
        "ratio": statistics.mean(a / b for a, b in zip(bits["distilled"], bits["plain"], strict=True)),
        "bits_per_byte": {
            side: {"mean": statistics.mean(found), "spread": statistics.stdev(found) if len(found) > 1 else None}
            for side, found in bits.items()
        },
    }


if __name__ == "__main__":
    main()
