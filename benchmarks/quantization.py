"""What does quantization cost? One pretrained run, fine-tuned on MathQA in bf16, quantized after training (PTQ), and
trained with quantization-aware training (QAT). Measures validation loss, bits per byte, accuracy, file size, and speed
and memory of decoding on this machine.

For each seed, two runs are trained through the command line, src/config/run/mathqa_full.yaml and mathqa_qat.yaml, with
the same data, batches, steps and learning rate. Each is then measured and exported in its variants. Complete parts are
not repeated: after an interruption, the same command continues.

    python benchmarks/quantization.py --base NAME [--output-dir runs] [--train FILE --validation FILE] [--steps 400]
        [--seeds 3] [--group-size 32] [--stored int4] [--page docs/how-to/quantization.md] [-- key=value]

Without --base (or with --quick) a tiny model is pretrained and fine-tuned on generated problems, with three variants
and one .pte, only to check that the script works. Prints one JSON line per variant and seed, and one with all results
at the end; the output folder also gets quantization.md and .png. `--page` writes the table and the figure into a page
of the documentation, between its two comments. Keys after `--` apply to every run.

"Recovered" is the share of PTQ's loss increase that QAT avoids, for int8_int4, from the means over seeds:
(PTQ - QAT) / (PTQ - bf16). Step time is QAT's over plain training's, both as trained here, from the median tokens per
second of all reports (for QAT, of those since fake quantization began). Speed and memory of decoding are those of
task=generate on this machine, where PyTorch multiplies in floating point whatever the weights are stored as. If
ExecuTorch is installed, they are also measured for the .pte of the first seed (for bf16: in float32), which a phone's
runtime runs on this CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from decoding_speed import decode, decode_program
from studies import MAIN, RUN_FILES, Setting, command, publish, series, setting, tuning_parser

TRAINED = {"bf16": "full", "int8_weight_only": "full", "int4_weight_only": "full", "int8_int4": "full",
           "qat_int8_int4": "qat"}  # fmt: skip
"""The training that each variant is measured on."""
RECIPE = "mathqa_full"
PROGRAMS = ("bf16", "int8_int4", "qat_int8_int4")
"""Variants that are also exported as a .pte: XNNPACK multiplies floats, or integers with integers."""


@dataclass(frozen=True)
class Study:
    """Settings shared by all runs, and how weights are stored."""

    folder: Path
    shared: tuple[str, ...]
    rounding: tuple[str, ...]

    def train(self, kind: str, seed: int) -> None:
        """Train the run, unless it is complete."""
        run = self.folder / f"{kind}-seed{seed}"
        if (run / "summary.json").is_file():
            return
        began = time.perf_counter()
        self._run(run.with_suffix(".train.log"), "qat_int8_int4" if kind == "qat" else "bf16", seed)
        print(f"{run.name}: trained in {time.perf_counter() - began:.0f} s", flush=True)

    def measure(self, variant: str, seed: int) -> dict[str, Any]:
        """The figures of a variant, measured once."""
        kept, run = self.folder / f"{variant}-seed{seed}.json", self.folder / f"{TRAINED[variant]}-seed{seed}"
        if not kept.is_file():
            log = kept.with_suffix(".log")
            self._run(log, variant, seed, "task=evaluate")
            evaluated = json.loads((run / "evaluation.json").read_text())
            files = self.folder / "files" / kept.stem
            if not files.is_dir():
                self._run(log, variant, seed, *export(variant, files))
            decoded = self.folder / f"{kept.stem}.decoding.json"
            command([__file__, "--decode", variant, str(run), str(decoded), *self.rounding], log)
            figures = {
                "variant": variant,
                "seed": seed,
                "val_loss": evaluated["val/loss"],
                "bits_per_byte": evaluated["val/bits_per_byte"],
                "accuracy": evaluated.get("mathqa/accuracy"),
                "accuracy_error": evaluated.get("mathqa/accuracy_error"),
                "file_bytes": (files / "model.safetensors").stat().st_size,
                **json.loads(decoded.read_text()),
            }
            kept.write_text(json.dumps(figures))
        found = json.loads(kept.read_text())
        print(json.dumps(found), flush=True)
        return found

    def program(self, variant: str) -> dict[str, Any]:
        """Size, speed and memory of a variant's .pte, for the first seed, measured once."""
        kept, files = self.folder / f"{variant}.program.json", self.folder / "files" / f"{variant}-program"
        if not kept.is_file():
            log = kept.with_suffix(".log")
            if not files.is_dir():
                self._run(log, variant, 1, *export_program(files))
            command([__file__, "--decode-program", str(files), str(kept)], log)
        found = json.loads(kept.read_text())
        print(json.dumps({"variant": variant, **found}), flush=True)
        return found

    def tokens_per_second(self, kind: str, seeds: Sequence[int]) -> float:
        """The median over all reports of a training's seeds; for QAT, of those since fake quantization began."""
        from pretune.run.folder import read_config

        speeds = []
        for run in (self.folder / f"{kind}-seed{seed}" for seed in seeds):
            section = read_config(run / "config.yaml")
            first = section["quantization"].get("start", 0.0) * section["budget"]["steps"] + section["log_every"]
            speeds += [speed for step, speed in series(run, "train/tokens_per_second") if step >= first]
        return statistics.median(speeds)

    def overrides(self, variant: str, seed: int, *task: str) -> list[str]:
        """Overrides of the recipe that train a variant; with `task`, that do something else with its run."""
        rounded = [f"quantization={variant}", *self.rounding] if variant != "bf16" else []
        mine = [f"name={TRAINED[variant]}-seed{seed}", f"seed={seed}", f"output_dir={self.folder}"]
        return [*mine, *self.shared, *rounded, *task]

    def _run(self, log: Path, variant: str, seed: int, *task: str) -> None:
        command([MAIN, "--config", str(RUN_FILES / f"{RECIPE}.yaml"), *self.overrides(variant, seed, *task)], log)


def export(variant: str, files: Path) -> list[str]:
    """Overrides that write a variant's weights as they are stored."""
    form = ["export.dtype=bfloat16"] if variant == "bf16" else ["export.format=integers", "export.measure=false"]
    return ["task=export", *form, f"export.output={files}"]


def export_program(files: Path) -> list[str]:
    """Overrides that write a .pte."""
    return ["task=export", "export.format=executorch", "export.measure=false", f"export.output={files}"]


def main() -> None:
    if sys.argv[1:2] == ["--decode"]:
        variant, run, output, *rounding = sys.argv[2:]
        Path(output).write_text(json.dumps(decode(variant, Path(run), rounding)))
        return
    if sys.argv[1:2] == ["--decode-program"]:
        Path(sys.argv[3]).write_text(json.dumps(decode_program(Path(sys.argv[2]))))
        return
    parser = tuning_parser(__doc__)
    parser.add_argument("--group-size", type=int, default=32, help="numbers that share a scale")
    parser.add_argument("--stored", choices=("int4", "int8", "none"), default="int4", help="embedding and head")
    options = parser.parse_args()
    with setting(parser, options, f"quantization-{{}}-{options.group_size}-{options.stored}") as given:
        study(options, given)


def study(options: argparse.Namespace, given: Setting) -> None:
    """Train, measure, and write the results."""
    folder, num_seeds = given.folder, 1 if given.quick else options.seeds
    variants, programs = (PROGRAMS, PROGRAMS[-1:]) if given.quick else (tuple(TRAINED), PROGRAMS)
    runs, seeds = Study(folder, given.shared, rounding(options)), range(num_seeds)
    measured: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
    for seed in (one + 1 for one in seeds):
        for kind in ("full", "qat"):
            runs.train(kind, seed)
        for variant in variants:
            measured[variant].append(runs.measure(variant, seed))
    rows = {variant: means(found) for variant, found in measured.items()}
    if find_spec("executorch") is not None:
        rows = {name: one | (runs.program(name) if name in programs else {}) for name, one in rows.items()}
    numbered = [one + 1 for one in seeds]
    whole = {
        "recovered": recovered(rows),
        "recovered_by_seed": [recovered({name: found[seed] for name, found in measured.items()}) for seed in seeds],
        "step_time_ratio": runs.tokens_per_second("full", numbered) / runs.tokens_per_second("qat", numbered),
    }
    table = markdown(rows, whole)
    (folder / "quantization.md").write_text(table)
    draw(rows, folder / "quantization.png")
    if options.page is not None:
        publish(
            options.page, table, "measured", folder / "quantization.png", "Validation loss against the size of the file"
        )
    print(table)
    claim = "QAT recovers what 4-bit PTQ costs, in little more time a step"
    print(json.dumps({"claim": claim, "target": {"recovered": 0.7, "step_time_ratio": 1.35}, "base": given.base,
                      "steps": given.steps, "seeds": num_seeds, **whole, "variants": rows}))  # fmt: skip


def rounding(options: argparse.Namespace) -> tuple[str, ...]:
    """Overrides that say how weights are rounded."""
    keys = (f"group_size={options.group_size}", f"embedding={options.stored}", f"head={options.stored}")
    return tuple(f"quantization.{key}" for key in keys)


def means(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of a variant over its seeds, and the spread of its loss."""
    names = [name for name, value in found[0].items() if isinstance(value, int | float) and name != "seed"]
    losses = [one["val_loss"] for one in found]
    spread = statistics.stdev(losses) if len(losses) > 1 else None
    return {**{name: statistics.mean(one[name] for one in found) for name in names}, "val_loss_spread": spread}


def recovered(rows: Mapping[str, Mapping[str, Any]]) -> float:
    """The share of PTQ's loss increase that QAT avoids."""
    whole, after, trained = (rows[name]["val_loss"] for name in ("bf16", "int8_int4", "qat_int8_int4"))
    return (after - trained) / (after - whole)


def markdown(rows: Mapping[str, Mapping[str, Any]], whole: Mapping[str, Any]) -> str:
    """The table for a page of the documentation."""
    lines = [
        "| | validation loss | bits per byte | accuracy | file | decoding in PyTorch | .pte | decoding the .pte |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in rows.items():
        spread = f" ± {one['val_loss_spread']:.4f}" if one["val_loss_spread"] is not None else ""
        asked = one.get("accuracy") is not None
        cells = (
            {"bf16": "bf16", "qat_int8_int4": "**QAT** int8_int4"}.get(name, f"PTQ {name}"),
            f"{one['val_loss']:.4f}{spread}",
            f"{one['bits_per_byte']:.4f}",
            f"{one['accuracy']:.1%} ± {one['accuracy_error']:.1%}" if asked else "not measured",
            f"{one['file_bytes'] / 2**20:,.2f} MiB ({one['file_bytes'] / rows['bf16']['file_bytes']:.2f}x)",
            speed(one["tokens_per_second"], one["peak_bytes"]),
            f"{one['program_bytes'] / 2**20:,.2f} MiB" if "program_bytes" in one else "",
            speed(one["program_tokens_per_second"], one["program_peak_bytes"]) if "program_bytes" in one else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    text = (
        f"QAT recovers {whole['recovered']:.0%} of the loss that rounding afterwards costs (int8_int4, "
        f"seeds: {', '.join(f'{one:.0%}' for one in whole['recovered_by_seed'])}); "
        f"its steps take {whole['step_time_ratio']:.2f} times those of plain training."
    )
    return "\n".join(lines) + f"\n\n{text}\n"


def speed(tokens_per_second: float, peak_bytes: float) -> str:
    return f"{tokens_per_second:,.0f} tokens/s, {peak_bytes / 2**20:,.0f} MiB"


def draw(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Loss against file size."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for (name, one), marker in zip(rows.items(), "os^vD", strict=False):
        size, loss = one["file_bytes"] / 2**20, one["val_loss"]
        # Hollow, because two of them may overlap.
        axes.errorbar(
            size, loss, yerr=one["val_loss_spread"], fmt=marker, markerfacecolor="none", capsize=3, label=name
        )
    axes.set(xlabel="file (MiB)", ylabel="validation loss", xlim=(0, 1.1 * rows["bf16"]["file_bytes"] / 2**20))
    axes.margins(y=0.15)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
