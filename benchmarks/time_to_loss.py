"""Claim: `budget_5m` reaches the final validation loss of `budget_5m_baseline` in a quarter of its time.

Same data, same tokenizer, same machine, one run at a time. The baseline (AdamW, cosine) trains for --minutes. Then our
recipe trains for shares of that time, from the shortest to the first whose final loss is no higher; each is a complete
run with its own learning-rate decay. Time is training time: compilation and evaluation do not count on either side. The
baseline's learning rate is the best of --rates, swept at the full time with the first seed (one rate: no sweep).

    python benchmarks/time_to_loss.py [--minutes 5] [--seeds 3] [--rates 1e-3 2e-3 4e-3] [--data 'texts/*.jsonl.xz']
        [--validation held_out.jsonl.xz] [--shares 0.2 0.25 0.3 0.4 0.6 1] [--runs runs/time_to_loss]
        [--picture docs/how-to/budget.png] [-- key=value ...]

Runs are kept in --runs; an existing run is not repeated, so an interrupted measurement can be continued. Keys after
`--` apply to every run. Prints a line of JSON per run and a table. The last line has `ratio`: the mean over seeds of
our seconds over the baseline's.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from studies import MAIN, ROOT, RUN_FILES, command, series

CORPUS = ROOT.parent / "shared" / "data" / "corpus"
OURS, BASELINE = "budget_5m", "budget_5m_baseline"


@dataclass(frozen=True)
class Study:
    """Settings shared by all runs."""

    shared: list[str]
    folder: Path

    def run(self, recipe: str, seconds: float, seed: int, *more: str) -> dict[str, Any]:
        """The summary of a run of a recipe, which is trained first if it does not exist."""
        name = "-".join([recipe, f"{seconds:g}s", f"seed{seed}", *(_as_name(one) for one in more)])
        overrides = self.overrides(name, seconds, seed, *more)
        self.folder.mkdir(parents=True, exist_ok=True)
        config = str(RUN_FILES / f"{recipe}.yaml")
        command([MAIN, "--config", config, *overrides], self.folder / f"{name}.log")
        summary = json.loads((self.folder / name / "summary.json").read_text())
        wanted = ("val/loss", "val/bits_per_byte", "seconds", "step", "tokens", "parameters", "device")
        figures = {"run": name, "recipe": recipe, "seed": seed, **{key: summary[key] for key in wanted}}
        print(json.dumps(figures), flush=True)
        return figures

    def overrides(self, name: str, seconds: float, seed: int, *more: str) -> list[str]:
        """Overrides of a recipe's run file."""
        keys = [f"name={name}", f"output_dir={self.folder}", f"budget.time={seconds}", f"seed={seed}", "tracker=none"]
        return [*keys, *self.shared, *more]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="time of the baseline")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", nargs="+", default=["2e-3"], help="the baseline's learning rates to choose from")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.2, 0.25, 0.3, 0.4, 0.6, 1.0])
    parser.add_argument("--data", help="files to train on; the default needs no network")
    parser.add_argument("--validation", help="files to measure on, with --data")
    parser.add_argument("--runs", type=Path, default=Path("runs/time_to_loss"))
    parser.add_argument("--picture", type=Path, help="where to draw loss against training seconds")
    parser.add_argument("overrides", nargs="*", help="after `--`: keys for every run")
    args = parser.parse_args()
    study = Study([*data(args), *args.overrides], args.runs.resolve())
    seconds = 60 * args.minutes
    sweep = {rate: study.run(BASELINE, seconds, 1, f"optimizer.lr={rate}") for rate in args.rates}
    rate = min(sweep, key=lambda one: sweep[one]["val/loss"])
    results = [compare(study, seconds, seed, rate, args.shares) for seed in range(1, args.seeds + 1)]
    show(results)
    if args.picture is not None:
        draw(results, study.folder, args.picture)
    reached = [one["ratio"] for one in results if one["ratio"] is not None]
    print(
        json.dumps(
            {
                "claim": f"{OURS} reaches the final loss of {BASELINE} in a share of its time",
                "ratio": round(statistics.mean(reached), 3) if len(reached) == len(results) else None,
                "baseline_rate": float(rate),
                "minutes": args.minutes,
                "seeds": results,
            }
        )
    )


def _as_name(override: str) -> str:
    """The last part of a key and its value, as part of a folder's name."""
    key, _, value = override.partition("=")
    return re.sub(r"[^A-Za-z0-9.-]+", "_", f"{key.rpartition('.')[2]} {value}" if value else key)


def compare(study: Study, seconds: float, seed: int, rate: str, shares: list[float]) -> dict[str, Any]:
    """A seed's baseline, and our shortest run with a loss no higher; `ratio` is None if there is none."""
    baseline, runs = study.run(BASELINE, seconds, seed, f"optimizer.lr={rate}"), []
    for share in sorted(shares):
        runs.append(study.run(OURS, share * seconds, seed))
        if runs[-1]["val/loss"] <= baseline["val/loss"]:
            return {
                "seed": seed,
                "ratio": runs[-1]["seconds"] / baseline["seconds"],
                "baseline": baseline,
                "ours": runs,
            }
    return {"seed": seed, "ratio": None, "baseline": baseline, "ours": runs}


def data(args: argparse.Namespace) -> list[str]:
    """Overrides for the texts: the given files, the corpus beside the repository, or this machine's documentation."""
    files, held_out = args.data, args.validation
    if files is None and CORPUS.is_dir():
        files, held_out = str(CORPUS / "train-*.jsonl.xz"), str(CORPUS / "validation.jsonl.xz")
    if files is None:
        return ["data=python_docs"]
    overrides = ["data=files", f"data.source.files=['{files}']"]
    if held_out:
        source = f"{{kind: files, files: ['{held_out}'], format: auto, max_rows: null}}"
        overrides += [f"data.validation.source={source}", "data.validation.fraction=null"]
    return overrides


def show(results: list[dict[str, Any]]) -> None:
    table = Table("seed", "run", "seconds", "val/loss", "bits per byte", "tokens")
    for result in results:
        for run in [result["baseline"], *result["ours"]]:
            row = [f"{run['seconds']:.0f}", f"{run['val/loss']:.3f}", f"{run['val/bits_per_byte']:.3f}"]
            table.add_row(str(run["seed"]), run["recipe"], *row, f"{run['tokens']:,}")
    Console(stderr=True).print(table)


def draw(results: list[dict[str, Any]], folder: Path, path: Path) -> None:
    """Loss against training seconds: the baselines, and each seed's last run of ours."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    sides = {BASELINE: [one["baseline"]["run"] for one in results], OURS: [one["ours"][-1]["run"] for one in results]}
    for color, (recipe, runs) in zip(("#ea580c", "#2563eb"), sides.items(), strict=True):
        for number, run in enumerate(runs):
            training, validation = (series(folder / run, name, "seconds") for name in ("train/loss", "val/loss"))
            first = number == 0  # one run of each side gets a label
            label = f"{recipe}: training" if first else None
            axes.plot(*zip(*training, strict=True), color=color, lw=1, label=label)
            label = "validation at the end" if first else None
            axes.plot(*zip(*validation, strict=True), color=color, ls="", marker="o", ms=5, label=label)
    # Only the first few steps lie above, and nothing lies below.
    axes.set(xlabel="training seconds", ylabel="nats a token", ylim=(None, 7.2))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
