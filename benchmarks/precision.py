"""Claims: float16 with loss scaling learns as well as bfloat16, and `precision=auto` chooses the fastest one here.

Losses: the same runs in fp32, bf16 and fp16, uncompiled, with --seeds of each. The model is small enough for a CPU
without 16-bit instructions. The last line has the means, their spread over seeds, and whether fp16's mean is within the
larger spread of bf16's. Speed: tokens per second of each (the median of the runs' reports), and the precision that
`auto` chose.

    python benchmarks/precision.py [--steps 300] [--seeds 3] [--data 'texts/*.jsonl.xz'] [--runs runs/precision]
        [--only fp32 bf16 fp16 auto] [-- key=value ...]

Runs are kept in --runs; an existing run is not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from studies import MAIN, ROOT, RUN_FILES, command, series

sys.path.insert(0, str(ROOT / "src"))

CORPUS = ROOT.parent / "shared" / "data" / "corpus"
RECIPE = "quickstart_pretrain"
SMALL = (
    "model={num_layers: 2, dim: 128, num_heads: 2, num_kv_heads: 2, head_dim: 64, mlp_dim: 352, vocab_size: 2048}",
    "data.sequence_length=128",
    "batch={tokens: 1024, micro_batch: 8}",
    "optimizer.lr=4e-3",
    "precision.compile=false",
    "evaluation={every: null, at_start: false}",
    "checkpoint.every=null",
    "samples.prompts=[]",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", default=str(CORPUS / "train-00.jsonl.xz") if CORPUS.is_dir() else None)
    parser.add_argument("--runs", type=Path, default=Path("runs/precision"))
    parser.add_argument("--only", nargs="+", default=["fp32", "bf16", "fp16", "auto"])
    parser.add_argument("overrides", nargs="*", help="after `--`: keys for every run")
    options = parser.parse_args()
    runs = {name: [trained(options, name, seed) for seed in range(1, options.seeds + 1)] for name in options.only}
    table = Table("precision", "validation loss", "over seeds", "tokens/s", "chosen", title=f"{options.steps} steps")
    figures = {}
    for name, folders in runs.items():
        summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
        losses = [summary["val/loss"] for summary in summaries]
        rates = [rate for folder in folders for _, rate in series(folder, "train/tokens_per_second")]
        figures[name] = {
            "loss": round(statistics.mean(losses), 4),
            "spread": round(statistics.stdev(losses), 4) if len(losses) > 1 else None,
            "losses": losses,
            "tokens_per_second": round(statistics.median(rates)),
            "overflows": [summary.get("train/overflows") for summary in summaries],
            "chosen": chosen(folders[0]),
        }
        row = figures[name]
        table.add_row(name, f"{row['loss']:.4f}", str(row["spread"]), f"{row['tokens_per_second']:,}", row["chosen"])
    Console(width=120).print(table)
    result: dict[str, object] = {"claim": "fp16 with a scaled loss ends where bf16 does", **figures}
    if {"bf16", "fp16"} <= figures.keys() and options.seeds > 1:
        difference = figures["fp16"]["loss"] - figures["bf16"]["loss"]
        spread = max(figures["fp16"]["spread"], figures["bf16"]["spread"])
        result |= {"difference": round(difference, 4), "within_spread": abs(difference) <= spread}
    if "auto" in figures:
        fastest = max(one["tokens_per_second"] for name, one in figures.items() if name != "auto")
        result["auto_against_fastest"] = round(figures["auto"]["tokens_per_second"] / fastest, 3)
    print(json.dumps(result))


def trained(options: argparse.Namespace, precision: str, seed: int) -> Path:
    """The folder of a run, which is trained first if it does not exist."""
    folder = options.runs.resolve() / f"{precision}-seed{seed}"
    if not (folder / "summary.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        keys = [f"name={folder.name}", f"output_dir={folder.parent}", f"seed={seed}"]
        config = str(RUN_FILES / f"{RECIPE}.yaml")
        command([MAIN, "--config", config, *keys, *overrides(options, precision)], folder.parent / f"{folder.name}.log")
    return folder


def overrides(options: argparse.Namespace, precision: str) -> list[str]:
    """Overrides of the recipe that all seeds have in common."""
    data = [] if options.data is None else ["data=files", f"data.source.files=[{options.data}]"]
    budget = [f"budget.steps={options.steps}", "budget.time=null"]
    return [f"precision={precision}", *budget, *data, *SMALL, *options.overrides]


def chosen(folder: Path) -> str:
    """The precision that a run was trained in."""
    from pretune.run.folder import read_config

    return read_config(folder / "config.yaml")["precision"]["compute"]


if __name__ == "__main__":
    main()
