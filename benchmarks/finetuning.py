"""Which fine-tuning? Full, LoRA, DoRA, LoHa, LoKr and QLoRA from one pretrained run, each at its best learning rate.

Each run trains src/config/run/mathqa_<method>.yaml through the command line, in a separate process, with the same data,
batches and steps. First the learning rate is swept with one seed, then more seeds are trained at the best rate (the
lowest final validation loss). Complete runs are not repeated: after an interruption, the same command continues.

    python benchmarks/finetuning.py --base NAME [--output-dir runs] [--train FILE --validation FILE] [--steps 400]
        [--methods full lora ...] [--factors 0.25 0.5 1 2 4] [--seeds 3] [--page docs/which-fine-tuning.md]
        [-- key=value]

Without --base (or with --quick) a tiny model is pretrained and fine-tuned on generated problems, only to check that the
script works. The last line is one JSON object; the output folder also gets finetuning.md, .csv and .png. `--page`
writes the table and the figure into a page of the documentation, between its two comments. Keys after `--` apply to
every run.

Validation loss is that of the last evaluation. The error of the accuracy comes from one run's finite number of
problems; if there are several seeds, the spread over them is given too. Scored tokens/s is the median of all reports.
Memory is measured separately, on three steps of the run at the best rate: the peak that training holds (weights,
gradients, optimizer state, activations), without the libraries.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies import MAIN, ROOT, RUN_FILES, Setting, command, publish, series, setting, tuning_parser

METHODS = ("full", "lora", "dora", "loha", "lokr", "qlora")


@dataclass(frozen=True)
class Job:
    """One run: a method, a learning rate and a seed."""

    method: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-lr{self.lr:.3g}-seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """Settings shared by all runs."""

    folder: Path
    shared: tuple[str, ...]
    jobs: int

    def figures(self, job: Job) -> dict[str, Any] | None:
        """The measurements of a complete run."""
        summary = self.folder / job.name / "summary.json"
        return json.loads(summary.read_text()) if summary.is_file() else None

    def memory(self, job: Job) -> int:
        """The peak memory of its training, measured once."""
        kept = self.folder / job.name / "training_memory.json"
        if not kept.is_file():
            command([__file__, "--memory-of", str(kept.parent)], kept.with_suffix(".log"))
        return json.loads(kept.read_text())["bytes"]

    def run(self, jobs: Sequence[Job]) -> None:
        """Run the jobs that are not complete yet."""
        missing = [job for job in dict.fromkeys(jobs) if self.figures(job) is None]
        with ThreadPoolExecutor(self.jobs) as pool:
            for number, (job, seconds) in enumerate(pool.map(self._train, missing), 1):
                figures = self.figures(job)
                assert figures is not None
                print(f"{number}/{len(missing)} {job.name}: {figures['val/loss']:.4f} in {seconds:.0f} s", flush=True)

    def _train(self, job: Job) -> tuple[Job, float]:
        began = time.perf_counter()
        config = RUN_FILES / f"mathqa_{job.method}.yaml"
        command([MAIN, "--config", str(config), *self.overrides(job)], self.folder / f"{job.name}.log")
        return job, time.perf_counter() - began

    def overrides(self, job: Job) -> list[str]:
        """Overrides of the method's run file."""
        mine = [f"name={job.name}", f"optimizer.lr={job.lr!r}", f"seed={job.seed}", f"output_dir={self.folder}"]
        return [*mine, *self.shared]


def main() -> None:
    parser = tuning_parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--factors", nargs="+", type=float, default=[0.25, 0.5, 1, 2, 4], help="of the run file's rate")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; more than one falsifies speed")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        sys.path.insert(0, str(ROOT / "src"))
        found = {"bytes": measure_memory(options.memory_of)}
        (options.memory_of / "training_memory.json").write_text(json.dumps(found))
        return
    with setting(parser, options, "finetuning-{}") as given:
        study(options, given)


def study(options: argparse.Namespace, given: Setting) -> None:
    """Sweep, train more seeds, and write the results."""
    folder, factors, num_seeds = given.folder, options.factors, options.seeds
    if given.quick:
        factors, num_seeds = [0.5, 1], 1
    all_runs = Study(folder, given.shared, options.jobs)
    sweep = {method: [Job(method, rate(method) * factor, 1) for factor in factors] for method in options.methods}
    all_runs.run([job for jobs in sweep.values() for job in jobs])
    best = {method: min(jobs, key=lambda job: loss_of(all_runs, job)) for method, jobs in sweep.items()}
    seeds = {method: [Job(method, job.lr, seed) for seed in range(1, num_seeds + 1)] for method, job in best.items()}
    all_runs.run([job for jobs in seeds.values() for job in jobs])
    rows = [row(all_runs, method, seeds[method], sweep[method]) for method in options.methods]
    table = markdown(rows)
    (folder / "finetuning.md").write_text(table)
    with (folder / "finetuning.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(all_runs, sweep, best, folder / "finetuning.png")
    if options.page is not None:
        title = "Validation loss over the learning rate, and loss over steps"
        publish(options.page, table, "measured", folder / "finetuning.png", title)
    print(table)
    print(json.dumps({"claim": "fine-tunings of one run, each at its best learning rate", "base": given.base,
                      "steps": given.steps, "seeds": num_seeds, "methods": rows}))  # fmt: skip


def loss_of(runs: Study, job: Job) -> float:
    figures = runs.figures(job)
    assert figures is not None
    return figures["val/loss"]


def row(runs: Study, method: str, seeds: Sequence[Job], sweep: Sequence[Job]) -> dict[str, Any]:
    """A method's row of the table: means over seeds."""
    found = [figures for job in seeds if (figures := runs.figures(job)) is not None]

    def over(key: str) -> list[float]:
        return [figures[key] for figures in found if figures.get(key) is not None]

    def mean(key: str) -> float | None:
        return statistics.mean(over(key)) if over(key) else None

    def spread(key: str) -> float | None:
        return statistics.stdev(over(key)) if len(over(key)) > 1 else None

    rates = sorted(job.lr for job in sweep)
    return {
        "method": method,
        "lr": seeds[0].lr,
        "lr_at_edge": len(rates) > 1 and seeds[0].lr in (rates[0], rates[-1]),
        "seeds": len(found),
        "val_loss": mean("val/loss"),
        "val_loss_spread": spread("val/loss"),
        "accuracy": mean("mathqa/accuracy"),
        "accuracy_error": mean("mathqa/accuracy_error"),
        "accuracy_spread": spread("mathqa/accuracy"),
        "chance": mean("mathqa/chance"),
        "scored_tokens_per_second": statistics.median(
            speed for job in seeds for _, speed in series(runs.folder / job.name, "train/scored_tokens_per_second")
        ),
        "peak_memory_bytes": runs.memory(seeds[0]),
        "trainable_parameters": found[0]["trainable_parameters"],
        "parameters": found[0]["parameters"],
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table for a page of the documentation."""
    lines = [
        "| method | learning rate | validation loss | accuracy | scored tokens/s | peak memory | trained parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        edge = " (edge of the sweep)" if one["lr_at_edge"] else ""
        accuracy = "not measured"
        if one["accuracy"] is not None:
            accuracy = f"{one['accuracy']:.1%} ± {one['accuracy_error']:.1%}"
            accuracy += f" (seeds ± {one['accuracy_spread']:.1%})" if one["accuracy_spread"] is not None else ""
        memory = one["peak_memory_bytes"]
        spread = f" ± {one['val_loss_spread']:.4f}" if one["val_loss_spread"] is not None else ""
        cells = (
            one["method"],
            f"{one['lr']:.3g}{edge}",
            f"{one['val_loss']:.4f}{spread}",
            accuracy,
            f"{one['scored_tokens_per_second']:,.0f}",
            f"{memory / 2**20:,.0f} MiB",
            f"{one['trainable_parameters']:,} ({one['trainable_parameters'] / one['parameters']:.2%})",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(runs: Study, sweep: dict[str, list[Job]], best: dict[str, Job], path: Path) -> None:
    """Loss over the learning rate, which shows each method's optimum, and loss over steps at the best rate: lines are
    training, dots are validation."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for method, jobs in sweep.items():
        ordered = sorted(jobs, key=lambda job: job.lr)
        left.plot([job.lr for job in ordered], [loss_of(runs, job) for job in ordered], marker="o", label=method)
        run = runs.folder / best[method].name
        (line,) = right.plot(*zip(*series(run, "train/loss"), strict=True), lw=1, label=method)
        right.plot(*zip(*series(run, "val/loss"), strict=True), ls="", marker="o", ms=4, color=line.get_color())
    left.set(xscale="log", xlabel="learning rate", ylabel="validation loss at the end", title="The sweep")
    right.set(xlabel="step", ylabel="loss (dots: validation)", title="At each method's best rate")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def rate(method: str) -> float:
    """The learning rate in the method's run file, or in the run file it builds on."""
    import yaml

    name: str | None = f"mathqa_{method}"
    while name is not None:
        content = yaml.safe_load((RUN_FILES / f"{name}.yaml").read_text())
        if "lr" in content.get("optimizer", {}):
            return float(content["optimizer"]["lr"])
        name = next((one for one in content["defaults"] if isinstance(one, str) and one.startswith("mathqa_")), None)
    sys.exit(f"{RUN_FILES / f'mathqa_{method}.yaml'} sets no optimizer.lr")


def measure_memory(run: Path) -> int:
    """Peak bytes that training the run holds, measured on a few steps of its data whose results are discarded."""
    from pretune.core.config import validate
    from pretune.data.mixture import training_loader
    from pretune.optim.optimizers import clip_gradients
    from pretune.parallel.data_parallel import SharedGradients
    from pretune.quantization.nf4 import NF4Linear
    from pretune.run.assembly import assemble_training
    from pretune.run.config import RunConfig
    from pretune.run.folder import read_config
    from pretune.tasks.train.micro_batch import MicroBatch, accumulate
    from side_by_side import peak_memory, reset_peak_memory

    config = validate(RunConfig, read_config(run / "config.yaml"))
    training = assemble_training(config, None)
    parts, optimizer, loss_of = training.parts, training.optimizer, training.loss_of
    loader = training_loader(parts.data, config.data, config.seed)
    assert config.batch.micro_batch != "auto", "a comparison fixes its micro-batch"
    rows, micro_batch = (
        config.batch.tokens // config.data.sequence_length,
        MicroBatch(config.batch.micro_batch, "", None),
    )

    shared = SharedGradients(parts.model, loss_of)

    def step(position: int) -> None:
        batch = loader.batch(position, rows)
        accumulate(shared, optimizer, batch, max(batch.num_scored(), 1), micro_batch, print)
        clip_gradients(parts.model, config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step(0)
    layers = [layer for layer in parts.model.modules() if isinstance(layer, NF4Linear)]
    compressed = {id(layer.weight) for layer in layers}
    held = sum(one.nbytes for one in parts.model.parameters() if id(one) not in compressed)
    held += sum(tensor.nbytes for layer in layers for tensor in layer.stored())
    held += sum(value.nbytes for slots in optimizer.state.values() for value in slots.values())
    at_rest = reset_peak_memory(parts.device.type)
    for position in (rows, 2 * rows):
        step(position)
    return peak_memory(parts.device.type) - at_rest + held


if __name__ == "__main__":
    main()
