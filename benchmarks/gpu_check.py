"""Claim: on this GPU, all that is computed agrees with its references, and speed and memory are as expected.

    python benchmarks/gpu_check.py [--page docs/performance.md] [--only PART ...] [--logs runs/gpu_check]

Runs the parts one after the other, together for less than ten minutes on one GPU; without one it says what they are. A
part that fails or takes too long is a row of the table that says so, and the others go on. The output of each part is
kept in a new folder in --logs. --page writes the table into a page, between the comments `gpu_check: begin` and `end`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from gpu_parts import FAILED, HOLDS, NOT_MEASURED, PARTS, Part, Row
from studies import publish

TOTAL = 590
"""Seconds for all parts."""
UNREADABLE = (OSError, ValueError, KeyError, ElementTree.ParseError)
"""Errors where a part has not left what it should, or what another part needs."""


def main() -> None:
    """Run the parts, print a table and the claim, and write the table into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help="a page with a place for the table")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS])
    parser.add_argument("--logs", type=Path, default=Path("runs/gpu_check"))
    options = parser.parse_args()
    parts = [part for part in PARTS if options.only is None or part.name in options.only]
    if not torch.cuda.is_available():
        print(outline(parts))
        print(json.dumps({"claim": "the GPU check holds", "ratio": None, "holds": None, "needs": "a CUDA GPU"}))
        return
    started, now = time.monotonic(), datetime.datetime.now()
    folder = (options.logs / f"{now:%Y-%m-%d-%H%M%S}").resolve()
    folder.mkdir(parents=True)
    rows = []
    for number, part in enumerate(parts, start=1):
        print(f"{number} of {len(parts)}, {part.name}: {part.measures}; about {part.seconds} s", flush=True)
        began = time.monotonic()
        rows += rows_of(part, folder, min(part.limit, TOTAL - (began - started)))
        print(f"  {time.monotonic() - began:.0f} s; {time.monotonic() - started:.0f} s in all", flush=True)
    heading = f"{now:%Y-%m-%d}, {machine()}, {time.monotonic() - started:.0f} s."
    show(heading, rows)
    print(f"the output of each part: {folder}")
    if options.page is not None:
        publish(options.page, f"{heading}\n\n{markdown(rows)}", "gpu_check")
    print(json.dumps(claim(rows, heading)))


def outline(parts: Sequence[Part]) -> str:
    """What would be done on a GPU."""
    lines = [f"  {part.name:<11} about {part.seconds:>3} s   {part.measures}" for part in parts]
    minutes = sum(part.seconds for part in parts) / 60
    return "\n".join(
        [
            f"This check needs a CUDA GPU, and torch {torch.__version__} finds none. On one it would run, in about "
            f"{minutes:.0f} minutes:",
            *lines,
        ]
    )


def rows_of(part: Part, folder: Path, seconds: float) -> list[Row]:
    """The rows of a part, which has this many seconds; one that says what went wrong if it did not succeed."""
    try:
        finish(part.command(folder), folder / f"{part.name}.log", seconds, part.codes)
        return part.rows(folder)
    except (Unfinished, *UNREADABLE) as error:
        what = str(error) if isinstance(error, Unfinished) else f"not understood: {error!r}"
        return [Row(part.measures[0].upper() + part.measures[1:], what.replace("|", "/"), "it runs", FAILED)]


class Unfinished(Exception):
    """A command that failed or was stopped."""


def finish(command: Sequence[str], log: Path, seconds: float, codes: Sequence[int]) -> None:
    """Run Python with these arguments to its end; Unfinished if that takes longer than `seconds`, or if it fails."""
    if seconds <= 0:
        raise Unfinished("not begun: no time was left")
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with log.open("w") as file, Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as clock:
        clock.add_task(log.name, total=None)
        # A group of its own, so that what it has started ends with it.
        process = subprocess.Popen(
            [sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Unfinished(f"stopped after {seconds:.0f} s ({log.name})") from None
        finally:
            _end(process)
    if code not in codes:
        last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
        raise Unfinished(f"exit code {code} ({log.name}): {''.join(last)[:200]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the process's group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)


def machine() -> str:
    """The GPU, its driver, and the libraries that computed."""
    major, minor = torch.cuda.get_device_capability()
    return (
        f"{torch.cuda.get_device_name()} (compute capability {major}.{minor}, driver {driver()}), "
        f"torch {torch.__version__}, triton {version('triton')}"
    )


def driver() -> str:
    """The version of NVIDIA's driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.splitlines()[0].strip()


def version(package: str) -> str:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table of a page."""
    lines = [f"| {row.part} | {row.figure} | {row.expected} | {row.verdict} |" for row in rows]
    return "\n".join(["| part | figure | expected | verdict |", "|---|---|---|---|", *lines, ""])


def show(title: str, rows: Sequence[Row]) -> None:
    """Print the rows as a table."""
    table = Table("part", "figure", "expected", "verdict", title=title, title_justify="left")
    for row in rows:
        table.add_row(row.part, row.figure, row.expected, row.verdict.strip("*"))
    Console(width=140).print(table)


def claim(rows: Sequence[Row], heading: str) -> dict[str, object]:
    """The share of rows that hold, of those that were measured, and all rows."""
    measured = [row for row in rows if row.verdict != NOT_MEASURED]
    holding = sum(row.verdict == HOLDS for row in measured)
    return {
        "claim": f"the GPU check holds: {heading}",
        "ratio": round(holding / max(len(measured), 1), 3),
        "holds": holding == len(measured) > 0,
        "sides": {row.part: [row.figure, row.verdict.strip("*")] for row in rows},
    }


if __name__ == "__main__":
    main()
