"""Claims: packed fine-tuning reads at least 5 times as many scored tokens per second as fine-tuning on padded
records (MathQA padded to 1,024 tokens, as in the reference system, or Alpaca padded to 512), and reaches a lower
validation loss in the same time.

    python benchmarks/finetune_packing.py [--set mathqa|alpaca] [--train FILE [--validation FILE]] [--tokenizer FILE]
                                          [--no-preamble] [--seconds 30] [-- key=value ...]

Both sides train a nano model through the command line, in bf16, compiled, with the same tokens per step, the padded
side first. Without --train they use generated word problems. An epoch has the same scored tokens on both sides, so the
ratio is that of epochs per second over the whole run: it does not depend on which records a short run happens to read.
The validation loss is over the same held-out records; without --validation these are a share of --train.
--no-preamble leaves out Alpaca's opening sentence on both sides. Keys after `--` apply to both.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from studies import MAIN, RUN_FILES, command

BASE = RUN_FILES.parent / "base.yaml"
PADDED_TO = {"mathqa": 1024, "alpaca": 512}
PADDED = ["data.packing.mode=none", "data.packing.isolate=false"]


def arguments() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=sorted(PADDED_TO), default="mathqa")
    parser.add_argument("--train", type=Path)
    parser.add_argument("--validation", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json; without it one is trained on the records")
    parser.add_argument("--no-preamble", action="store_true")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("overrides", nargs="*", help="after `--`: keys for both sides")
    return parser


def main() -> None:
    """Train both sides in turn; print a line for each, and the claims last."""
    options = arguments().parse_args()
    length, found = PADDED_TO[options.set], {}
    with tempfile.TemporaryDirectory() as folder:
        for side, overrides in sides(options).items():
            found[side] = trained(side, overrides, Path(folder))
            print(json.dumps({"side": side, **found[side]}))
    padded, packed = found.values()
    rates = [side["epochs"] / side["seconds"] for side in (padded, packed)]
    losses = [side["validation_loss"] for side in (padded, packed)]
    claim = f"packed {options.set} gives at least 5 times the scored tokens per second of padding to {length}"
    ratio = round(rates[1] / rates[0], 2)
    print(json.dumps({"claim": claim, "ratio": ratio, "holds": ratio >= 5}))
    claim = f"packed {options.set} has a lower validation loss after the same time"
    ratio = round(losses[1] / losses[0], 4)
    print(json.dumps({"claim": claim, "ratio": ratio, "holds": ratio < 1, **dict(zip(found, losses, strict=True))}))


def sides(options: argparse.Namespace) -> dict[str, list[str]]:
    """Overrides of base.yaml for each side, the padded one first."""
    length = PADDED_TO[options.set]
    packing = {
        f"padded_to_{length}": [*PADDED, f"data.sequence_length={length}"],
        "packed": ["data.sequence_length=512"],
    }
    return {side: [*data(options), *keys, *run(options), *options.overrides] for side, keys in packing.items()}


def data(options: argparse.Namespace) -> list[str]:
    """Overrides that set the records and the tokenizer."""
    tokenizer = ["data/tokenizer=trained", "data.tokenizer.max_bytes=2000000"]
    if options.tokenizer:
        tokenizer = ["data/tokenizer=file", f"data.tokenizer.path={options.tokenizer.resolve()}"]
        tokenizer += ["data.tokenizer.eos='<|endoftext|>'", "model.vocab_size=50304"]
    if options.train is None:
        return ["data=word_problems", "data.validation.fraction=0.01", *tokenizer]
    if options.no_preamble:
        tokenizer.append("data.format.preamble=false")
    source = [f"data={options.set}", "data/source=files", f"data.source.files=[{options.train.resolve()}]"]
    held_out = ["data.validation.fraction=0.005"]
    if options.set == "mathqa" and options.validation is None:
        held_out.append("data.validation.source=null")
    if options.validation:
        held_out = ["data/source@data.validation.source=files", "data.validation.fraction=null"]
        held_out.append(f"data.validation.source.files=[{options.validation.resolve()}]")
    return [*source, *held_out, *tokenizer]


def run(options: argparse.Namespace) -> list[str]:
    """Overrides common to both sides."""
    batch = ["batch.tokens=8192", "batch.micro_batch=8", "model.max_sequence_length=1024", "log_every=5"]
    quiet = ["evaluation.every=null", "evaluation.at_start=false", "checkpoint.every=null", "samples.prompts=[]"]
    return [*batch, *quiet, "model=nano", "precision=bf16", "budget.steps=null", f"budget.time={options.seconds}"]


def trained(side: str, overrides: list[str], folder: Path) -> dict[str, Any]:
    """The summary of a run."""
    keys = [f"name={side}", f"output_dir={folder}", *overrides]
    command([MAIN, "--config", str(BASE), *keys], folder / f"{side}.log")
    summary = json.loads((folder / side / "summary.json").read_text())
    names = {
        "scored_tokens_per_second": "train/scored_tokens_per_second", "validation_loss": "val/loss",
        "validation_tokens": "val/tokens", "steps": "step", "seconds": "seconds", "epochs": "epochs",
    }  # fmt: skip
    return {name: round(summary[key], 5) for name, key in names.items()}


if __name__ == "__main__":
    main()
