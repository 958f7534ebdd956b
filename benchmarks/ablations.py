"""Claim: each switch of `budget_5m` lowers the loss after a fixed time; this measures what removing one costs.

Trains the recipe, and the recipe with one change, for the same training time, with the same data and seeds, one run at
a time. Time is training time, so a switch pays for its own operations; the table shows the number of steps beside the
loss. A difference is between runs of the same seed, which read the same batches; its spread is over seeds.

    python benchmarks/ablations.py [--seconds 60] [--seeds 2] [--only NAME ...] [--data 'texts/*.jsonl.xz']
        [--validation held_out.jsonl.xz] [--runs runs/ablations] [--page docs/performance.md] [-- key=value ...]

Runs are kept in --runs; an existing run is not repeated. Keys after `--` apply to every run. Prints a line of JSON per
run and a table; the last line is one JSON object with all results. `--page` writes the table into a page, between its
two comments.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from studies import publish
from time_to_loss import OURS, Study, data

SWITCHES: dict[str, tuple[str, ...]] = {
    "the recipe": (),
    "AdamW for all (learning rate 2e-3, decay 0.1)": ("optimizer=adamw", "optimizer.lr=2e-3"),
    "SwiGLU of the same size, not ReLU squared": ("model.activation=swiglu", "model.mlp_dim=688"),
    "outputs start scaled, not at zero": ("model.init.output=scaled",),
    "no normalized queries and keys": ("model.qk_norm=false",),
    "learned norms": ("model.norm.learned=true",),
    "embedding not normalized": ("model.normalize_embedding=false",),
    "tied head": ("model.tied_embeddings=true",),
    "attention_scale 1.44": ("model.attention_scale=1.44",),
    "value embeddings": ("model.value_embeddings=true",),
    "residual scalars": ("model.residual_scalars=true",),
    "all three": ("model.value_embeddings=true", "model.residual_scalars=true", "model.attention_scale=1.44"),
    "softcap 15": ("model.softcap=15",),
    "windows of 64, every other layer": ("model.window={size: 64, pattern: SL, full_last_layer: true}",),
    "4 layers, not 3": ("model.num_layers=4",),
    "6 layers": ("model.num_layers=6",),
    "4 heads of 64, not 2 of 128": ("model.num_heads=4", "model.num_kv_heads=4", "model.head_dim=64"),
    "NorMuon (neuron_beta 0.95)": ("optimizer.neuron_beta=0.95",),
    "cautious weight decay 0.1": ("optimizer.cautious_decay=true", "optimizer.weight_decay=0.1"),
    "momentum warmed up over 0.2": ("optimizer.momentum_warmup=0.2",),
    "4,096 tokens a step": ("batch.tokens=4096",),
    "cosine, not a trapezoid": ("schedule=cosine", "~schedule.decay"),
}
"""What is removed or added, as overrides of the recipe. The rates of AdamW are those of the baseline's sweep."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=list(SWITCHES), default=list(SWITCHES), metavar="NAME")
    parser.add_argument("--data", help="files to train on; the default needs no network")
    parser.add_argument("--validation", help="files to measure on, with --data")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--page", type=Path)
    parser.add_argument("overrides", nargs="*", help="after `--`: keys for every run")
    args = parser.parse_args()
    study, seeds = Study([*data(args), *args.overrides], args.runs.resolve()), range(1, args.seeds + 1)
    names = list(dict.fromkeys(["the recipe", *args.only]))
    # Seed by seed, so that an interrupted measurement has every switch once.
    runs = {(name, seed): study.run(OURS, args.seconds, seed, *SWITCHES[name]) for seed in seeds for name in names}
    by_name = {name: [runs[name, seed] for seed in seeds] for name in names}
    rows = [row(name, by_name[name], by_name["the recipe"]) for name in names]
    table = markdown(rows)
    if args.page is not None:
        publish(args.page, table, "ablations")
    print(table)
    print(json.dumps({"claim": f"what the switches of {OURS} buy", "seconds": args.seconds, "switches": rows}))


def row(name: str, runs: list[dict[str, Any]], recipe: list[dict[str, Any]]) -> dict[str, Any]:
    """A switch's row of the table: means over seeds, and its difference from the recipe."""
    losses = [run["val/loss"] for run in runs]
    worse = [loss - plain["val/loss"] for loss, plain in zip(losses, recipe, strict=True)]
    return {
        "switch": name,
        "losses": losses,
        "loss": statistics.mean(losses),
        "difference": statistics.mean(worse),
        "spread": statistics.stdev(worse) if len(worse) > 1 else None,
        "steps": statistics.mean(run["step"] for run in runs),
        "parameters": runs[0]["parameters"],
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| | validation loss | difference | steps | parameters |", "|---|---:|---:|---:|---:|"]
    for one in rows:
        spread = "" if one["spread"] is None else f" ± {one['spread']:.3f}"
        difference = "" if one["switch"] == "the recipe" else f"{one['difference']:+.3f}{spread}"
        cells = (one["switch"], f"{one['loss']:.3f}", difference, f"{one['steps']:.0f}", f"{one['parameters']:,}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
