"""Claim: a model of 512 tokens finds a pass key in 2,048 after a short fine-tuning, at least 95% of the time, and
before hardly ever.

Trains `long_context_base` for --seconds, asks it for pass keys in texts of 256 to 2,048 tokens, stretches it as
`long_context_small` says for as long again, and asks again: --examples for each length and depth.

    python benchmarks/long_context.py [--seconds 240] [--examples 10] [--runs runs/long_context] [--picture FILE]
        [-- key=value ...]

Runs are kept in --runs, and an existing one is not repeated. The heat maps of both go into --picture. The last line has
the shares of right answers by length, before and after.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from studies import MAIN, RUN_FILES, command

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

LENGTHS = (256, 512, 1024, 2048)
BASE, STRETCHED = "long_context_base", "long_context_small"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--examples", type=int, default=10)
    parser.add_argument("--runs", type=Path, default=Path("runs/long_context"))
    parser.add_argument("--picture", type=Path)
    parser.add_argument("overrides", nargs="*", help="after `--`: keys for every run")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in (BASE, STRETCHED):
        command([MAIN, "--config", str(RUN_FILES / f"{name}.yaml"), *training(args, name)], args.runs / f"{name}.log")
        run = args.runs / name
        command([MAIN, "--config", str(run / "config.yaml"), *asking(args.examples)], args.runs / f"{name}-asked.log")
        found[name] = json.loads((run / "evaluations" / "passkey.json").read_text())
        print(json.dumps({"run": name, "right": by_length(found[name])}), flush=True)
    if args.picture is not None:
        draw_both(found, args.picture)
    before, after = by_length(found[BASE]), by_length(found[STRETCHED])
    print(
        json.dumps(
            {
                "claim": "right pass keys in texts four times as long as the model was trained on: at least 0.95 after "
                "the fine-tuning, near 0 before",
                "before": before,
                "after": after,
                "ratio": after[str(max(LENGTHS))],
                "seconds": args.seconds,
                "examples": args.examples,
            }
        )
    )


def training(args: argparse.Namespace, name: str) -> list[str]:
    """Overrides of a training."""
    start = [f"stage.init_from={args.runs / BASE}"] if name == STRETCHED else []
    budget = f"budget={{steps: null, time: {args.seconds}}}"
    return [f"output_dir={args.runs}", budget, "report.after_training=false", *start, *args.overrides]


def asking(examples: int) -> list[str]:
    """Overrides of an evaluation: the base model too gets positions for the longest text."""
    lengths = ",".join(map(str, LENGTHS))
    return [
        "task=evaluate", "evaluation=passkey", f"evaluation.retrieval.examples={examples}",
        f"evaluation.retrieval.lengths=[{lengths}]", "model.max_sequence_length=2112",
        "data/source@evaluation.retrieval.source.text=python_docs_small",
    ]  # fmt: skip


def by_length(found: dict[str, Any]) -> dict[str, float]:
    """The share of right answers of each length."""
    cells = {
        str(length): [cell["accuracy"] for cell in found["cells"] if cell["length"] == length] for length in LENGTHS
    }
    return {length: round(sum(shares) / len(shares), 3) for length, shares in cells.items()}


def draw_both(found: dict[str, dict[str, Any]], path: Path) -> None:
    from pretune.tasks.evaluate.heat_map import HeatMap, draw

    maps = []
    for name, one in found.items():
        shares = {(cell["length"], cell["depth"]): cell["accuracy"] for cell in one["cells"]}
        lengths, depths = (sorted({cell[place] for cell in shares}) for place in (0, 1))
        maps.append((name, HeatMap(one["task"], lengths, depths, shares, one["trained_length"])))
    path.write_bytes(draw(maps))


if __name__ == "__main__":
    main()
