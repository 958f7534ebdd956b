"""Claim: variants of tasks, votes over variants, and training on each task answer more held-out tasks of grids.

A model of `grid_puzzles` is trained from random weights on plain tasks for --base-seconds. From it, two models are
fine-tuned for --seconds each: on the same plain tasks, and on their variants with each pair learned from the others.
All three answer the same --tasks held-out tasks, greedily and by a vote over 8 variants, as they are and after --steps
steps on each task's own pairs. Same data, split, recipe and machine, one run at a time; seeds change the weights and
the order.

    python benchmarks/arc.py [--base-seconds 240] [--seconds 120] [--tasks 50] [--steps 16] [--seeds 3]
        [--runs runs/arc] [-- key=value ...]

Runs are kept in --runs; an existing run is not repeated. Keys after `--` apply to every run. Prints a line of JSON per
run; the last line has the means over seeds of each figure of each side, and their standard deviations.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies import MAIN, RUN_FILES, command

RECIPE = "grid_puzzles"
SIDES: dict[str, tuple[str, ...]] = {
    "base": (),
    "plain": (),
    "variants": ("data.format.augment.variants=8", "data.format.leave_one_out=true"),
}
"""What each side trains on; all but the first start from the first."""
FIGURES = tuple(
    f"arc/{before}{name}"
    for before in ("", "trained_")
    for name in ("accuracy", "voted_accuracy", "voted_pass_2", "token_accuracy", "no_grid")
)


@dataclass(frozen=True)
class Study:
    """Settings shared by all runs."""

    shared: list[str]
    folder: Path
    seconds: dict[str, float]
    """Training time of each side."""
    tasks: int
    steps: int

    def of_side(self, side: str, seed: int) -> list[str]:
        """Overrides of the run file."""
        start = [] if side == "base" else ["stage=finetune", f"stage.init_from={self.folder / f'base-seed{seed}'}",
                                           "data/tokenizer=inherited", "model=auto"]  # fmt: skip
        return [
            f"name={side}-seed{seed}", f"output_dir={self.folder}", f"seed={seed}", *start, *SIDES[side],
            f"budget={{time: {self.seconds[side]}, count: []}}", "tracker=none", "evaluation.arc=null",
            "evaluation.every=null", "evaluation.at_start=false", "samples.prompts=[]", *self.shared,
        ]  # fmt: skip

    def of_evaluation(self) -> list[str]:
        """Overrides of a run's config.yaml for its answers."""
        return [
            "task=evaluate", "evaluation=arc", f"evaluation.max_problems={self.tasks}", "evaluation.arc.batch_size=32",
            "evaluation.arc.max_new_tokens=128", f"evaluation.arc.train_each.steps={self.steps}",
            "evaluation.arc.train_each.lr=1e-3", "evaluation.arc.train_each.seconds=600",
        ]  # fmt: skip

    def run(self, side: str, seed: int) -> dict[str, Any]:
        """The figures of a side, which is trained first if it does not exist."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{side}-seed{seed}"
        place, log = self.folder / name, self.folder / f"{name}.log"
        command([MAIN, "--config", str(RUN_FILES / f"{RECIPE}.yaml"), *self.of_side(side, seed)], log)
        summary = json.loads((place / "summary.json").read_text())
        command(
            [MAIN, "--config", str(place / "config.yaml"), *self.of_evaluation()], self.folder / f"{name}.answers.log"
        )
        found = json.loads((place / "evaluation.json").read_text())
        wanted = {key: summary[key] for key in ("seconds", "step", "tokens", "parameters", "device") if key in summary}
        figures = {"run": name, **wanted, **{key: found[key] for key in (*FIGURES, "arc/questions")}}
        print(json.dumps(figures), flush=True)
        return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base-seconds", type=float, default=240.0, help="training time of the first model")
    parser.add_argument("--seconds", type=float, default=120.0, help="training time of each that starts from it")
    parser.add_argument("--tasks", type=int, default=50, help="held-out tasks to answer")
    parser.add_argument("--steps", type=int, default=16, help="steps on each task's own pairs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/arc"))
    parser.add_argument("overrides", nargs="*", help="after `--`: keys for every run")
    args = parser.parse_args()
    seconds = {side: args.base_seconds if side == "base" else args.seconds for side in SIDES}
    study = Study(args.overrides, args.runs.resolve(), seconds, args.tasks, args.steps)
    # Seed by seed, so that an interrupted measurement has every side once.
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for seed in range(1, args.seeds + 1):
        for side in SIDES:
            runs[side].append(study.run(side, seed))
    print(json.dumps({"sides": compared(runs), "seconds": seconds, "steps": args.steps, "seeds": args.seeds,
                      "claim": "variants, votes and training on each task answer more held-out tasks"}))  # fmt: skip


def compared(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The mean and the standard deviation over seeds of each figure of each side."""
    return {side: {key: _mean([run[key] for run in found]) for key in FIGURES} for side, found in runs.items()}


def _mean(values: list[float]) -> dict[str, float | None]:
    return {"mean": statistics.mean(values), "spread": statistics.stdev(values) if len(values) > 1 else None}


if __name__ == "__main__":
    main()
