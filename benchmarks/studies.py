"""Shared by the studies: fine-tuning runs of one pretrained run, through the command line, and pages for the results.

On its own it measures nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RUN_FILES = ROOT / "src" / "config" / "run"
MAIN = str(ROOT / "src" / "main.py")
QUICK = (
    "data=word_problems",
    "data.source.num_problems=400",
    "data.sequence_length=128",
    "batch.tokens=512",
    "batch.micro_batch=4",
    "evaluation.every=10",
    "evaluation.max_problems=20",
    "precision.compile=false",
)

# Groups of 32 numbers, which quantization.py rounds together, divide 192.
QUICK_BASE = ("samples.prompts=[]", "model.mlp_dim=192")


def tuning_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of a study of MathQA runs from one base run."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="the pretrained run: its name in --output-dir, or its folder")
    parser.add_argument("--output-dir", type=Path, default=Path("runs"))
    parser.add_argument("--train", type=Path, help="records in MathQA's fields; without it they come from the hub")
    parser.add_argument("--validation", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tiny model, as few runs as possible: does it work?")
    parser.add_argument("overrides", nargs="*", help="after `--`: keys for every run")
    return parser


@dataclass(frozen=True)
class Setting:
    """Common to all runs of a study: their folder, and the keys that set start, steps, model and records."""

    folder: Path
    base: str
    steps: int
    shared: tuple[str, ...]
    quick: bool
    """A tiny model, as few runs as possible."""


@contextmanager
def setting(parser: argparse.ArgumentParser, options: argparse.Namespace, study: str) -> Iterator[Setting]:
    """The setting of the study `study` (`{}`: the name of the base run), for as long as its runs are needed."""
    if (options.train is None) != (options.validation is None):
        parser.error("--train and --validation belong together")
    sys.path.insert(0, str(ROOT / "src"))
    if options.base is None or options.quick:
        with tempfile.TemporaryDirectory() as folder:
            base = quick_base(Path(folder))
            yield Setting(Path(folder), base.name, 20, (*start(base, 20), *QUICK, *options.overrides), True)
        return
    folders = (options.output_dir / options.base, Path(options.base))
    base = next((path for path in folders if path.is_dir()), None)
    if base is None:
        parser.error(f"no run {options.base} in {options.output_dir}; pretrain one first, or name its folder")
    folder = (options.output_dir / study.format(base.name)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    shared = (*start(base, options.steps), *records(options), *options.overrides)
    yield Setting(folder, base.name, options.steps, shared, False)


def start(base: Path, steps: int) -> list[str]:
    """Overrides that start from the run `base` and train for this many steps."""
    return [f"stage.init_from={base.resolve()}", f"budget.steps={steps}", *shape_of(base)]


def series(run: Path, name: str, by: str = "step") -> list[tuple[float, float]]:
    """A metric of a run, over steps or over another metric."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(row[by], row[name]) for row in rows if name in row]


def shape_of(base: Path) -> list[str]:
    """Overrides that give the model the configuration of the run `base`."""
    from pretune.run.folder import read_config

    def flat(mapping: dict[str, Any], prefix: str) -> list[str]:
        lines = []
        for key, value in mapping.items():
            # A section that is null in one may be a mapping in the other: `++` replaces both.
            inner = isinstance(value, dict)
            lines += flat(value, f"{prefix}{key}.") if inner else [f"++{prefix}{key}={json.dumps(value)}"]
        return lines

    return flat(read_config(base / "config.yaml")["model"], "model.")


def records(options: argparse.Namespace) -> list[str]:
    """Overrides that set the records."""
    if options.train is None:
        return []
    held_out = "data/source@data.validation.source=files"
    files = [f"data.source.files=[{options.train.resolve()}]"]
    return ["data/source=files", held_out, *files, f"data.validation.source.files=[{options.validation.resolve()}]"]


def quick_base(folder: Path) -> Path:
    """A tiny model that has seen twenty steps."""
    settings = ["name=base", f"output_dir={folder}", *QUICK_BASE]
    command([MAIN, "--config", str(RUN_FILES / "smoke.yaml"), *settings], folder / "base.log")
    return folder / "base"


def command(arguments: Sequence[str], log: Path) -> None:
    """Run a Python script to its end; exit if it fails."""
    with log.open("w") as file:
        done = subprocess.run([sys.executable, *arguments], stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        sys.exit(
            f"{' '.join(arguments)}\nended with code {done.returncode}; the end of {log}:\n{log.read_text()[-2000:]}"
        )


def publish(page: Path, table: str, place: str, picture: Path | None = None, title: str = "") -> None:
    """Write a table, and optionally a figure, into a page, between the comments `PLACE: begin` and `PLACE: end`."""
    marks = f"<!-- {place}: begin -->", f"<!-- {place}: end -->"
    before, begin, rest = page.read_text().partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        sys.exit(f"{page} has no place for the table: it lacks {marks[0]} or {marks[1]}")
    shown = ""
    if picture is not None:
        image = page.with_suffix(".png")
        image.write_bytes(picture.read_bytes())
        shown = f"![{title}]({image.name})\n\n"
    page.write_text(f"{before}{begin}\n\n{table}\n{shown}{end}{after}")
