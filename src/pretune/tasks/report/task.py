"""Compare runs by their recorded metrics: a table, curves, and a page with both."""

from __future__ import annotations

import csv
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pretune.core.config import InputError
from pretune.core.files import write_atomic
from pretune.core.tables import as_markdown, show_table
from pretune.core.terminal import say, warn
from pretune.core.units import memory, short
from pretune.run.config import RunConfig
from pretune.run.folder import RunFolder, find_run, read_config
from pretune.tasks.report.figure import Curves, draw
from pretune.tasks.report.grids import answered_tests, draw_tests
from pretune.tasks.report.groups import common_name, mean_and_spread, same_but_for_the_seed
from pretune.tasks.report.page import Picture, Section, page
from pretune.tasks.report.verdict import verdict
from pretune.tracker.files import first_value, read_rows
from pretune.tracker.metrics import error_of, is_task_share, metric
from pretune.tracker.tracker import RECORDED, changed_since

PAGE = "report.html"
"""The last of its files."""


def report_runs(config: RunConfig) -> int:
    """task=report: compare `report.runs`, or report on the config's own run; files go into that run's folder.

    Returns 1 where report.verify is set and a run has not learned anything.
    """
    own = Path(config.output_dir) / config.name
    named = [find_run(name, config.output_dir).path for name in config.report.runs or (config.name,)]
    folders = list({folder.resolve(): folder for folder in named}.values())
    if len(folders) < len(named):
        say(f"{len(named)} names of {len(folders)} runs: each is in the report once")
    report(folders, own)
    return verify(folders) if config.report.verify else 0


def verify(folders: Sequence[Path]) -> int:
    """Print whether each run has learned; return 0 if all have, else 1."""
    verdicts = [verdict(run.name, run.rows, run.summary) for run in map(read_run, folders)]
    for learned, line in verdicts:
        say(line, file=sys.stdout if learned else sys.stderr)
    return 0 if all(learned for learned, _ in verdicts) else 1


def report(folders: Sequence[Path], destination: Path) -> None:
    """Write report.html, report.md, report.csv and curves.png for the runs in `folders`, and print the table.

    Raises InputError for a run without metrics and for a destination that cannot be written.
    """
    runs = [read_run(folder) for folder in folders]
    columns = COLUMNS + mixed_columns(runs) + accuracy_columns(runs)
    columns = [column for column in columns if any(column.of(run) is not None for run in runs)]
    groups = grouped(runs)
    picture = draw([Curves(run.name, run.stage, run.rows, group.name) for group in groups for run in group.runs])
    sections = [Section(run.name, run.stage, run.config_text, run.samples, run.summary) for run in runs]
    header = [column.header for column in columns]
    body = [[column.text(group) for column in columns] for group in groups]
    try:
        write_atomic(destination / "curves.png", picture)
        write_atomic(destination / "report.csv", as_csv(columns, runs))
        write_atomic(destination / "report.md", as_markdown(header, body))
        maps = [one for folder in folders for one in _heat_maps(folder)]
        pictures = [Picture(picture, "Loss and accuracy over training tokens"), *_grids(folders), *maps]
        write_atomic(destination / PAGE, page(pictures, [(header, body)], sections))
    except OSError as error:
        raise InputError(
            f"cannot write the report to {destination} ({os.strerror(error.errno or 0).lower()})"
        ) from None
    show_table(header, body)
    if len(groups) < len(runs):
        say("± of several seeds is the standard deviation between them; report.csv has each run.")
    say(f"report: {destination / PAGE}, curves: {destination / 'curves.png'}")


def _heat_maps(folder: Path) -> list[Picture]:
    """What evaluations of a run have drawn, each task's newest."""
    files = sorted(file for file in (folder / "evaluations").glob("*.png") if not file.name.startswith("step-"))
    return [Picture(file.read_bytes(), f"{file.stem} of {folder.name}, as it was evaluated last") for file in files]


def _grids(folders: Sequence[Path]) -> list[Picture]:
    """A picture for each run that has answered tasks of grids."""
    answered = {folder.name: tests for folder in folders if (tests := answered_tests(folder))}
    return [Picture(draw_tests(tests), f"Tasks as {name} answers them") for name, tests in answered.items()]


@dataclass(frozen=True)
class RunRecord:
    """The records in a run's folder."""

    name: str
    stage: str
    rows: list[dict[str, Any]]
    """metrics.jsonl"""
    samples: list[dict[str, Any]]
    """samples.jsonl"""
    summary: dict[str, Any]
    """summary.json; empty until the run is complete."""
    config: dict[str, Any]
    """config.yaml; empty if there is none."""
    config_text: str

    def last(self, name: str) -> Any:
        """The newest value of a metric, or None."""
        return first_value(reversed(self.rows), name)

    def least(self, name: str) -> Any:
        return min((row[name] for row in self.rows if row.get(name) is not None), default=None)

    def best_step(self) -> int | None:
        """The first step at which val/loss was lowest."""
        rows = [row for row in self.rows if row.get("val/loss") is not None]
        return min(rows, key=lambda row: row["val/loss"])["step"] if rows else None

    def speed(self) -> float | None:
        """Training tokens per second over the whole run."""
        tokens, seconds = self.last("tokens"), self.last("seconds")
        return tokens / seconds if tokens and seconds else None

    def scored_speed(self) -> float | None:
        """Scored tokens per second over the whole run, if not all tokens are scored."""
        scored, read, speed = (
            self.last("train/scored_tokens_per_second"),
            self.last("train/tokens_per_second"),
            self.speed(),
        )
        return speed * scored / read if speed and read and scored and scored < 0.99 * read else None

    def trained(self) -> int | None:
        """Trained parameters, if not all are trained."""
        trained = self.summary.get("trainable_parameters")
        return trained if trained != self.summary.get("parameters") else None


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed; often a single run."""

    name: str
    runs: list[RunRecord]


def grouped(runs: Sequence[RunRecord]) -> list[Group]:
    """The runs, grouped over seeds."""
    groups = [[runs[place] for place in places] for places in same_but_for_the_seed([run.config for run in runs])]
    return [Group(common_name([run.name for run in group]), group) for group in groups]


def read_run(folder: Path) -> RunRecord:
    """The records in `folder`; InputError if there are none."""
    metrics, samples, config = (folder / name for name in ("metrics.jsonl", "samples.jsonl", "config.yaml"))
    summary = RunFolder(folder).complete() or {}
    for file in changed_since(folder, summary.get(RECORDED, {})):
        warn(f"note: {file} is not what the run wrote: what is reported from it may be incomplete or wrong")
    rows = read_rows(metrics) if metrics.is_file() else []
    if not rows:
        raise InputError(f"{folder} has no metrics yet (metrics.jsonl is missing or empty); train the run first")
    mapping = read_config(config) if config.is_file() else {}
    return RunRecord(
        name=folder.resolve().name,
        stage=mapping.get("stage", {}).get("kind", "run"),
        config=mapping,
        rows=rows,
        samples=read_rows(samples) if samples.is_file() else [],
        summary=summary,
        config_text=config.read_text() if config.is_file() else "",
    )


@dataclass(frozen=True)
class Column:
    """A column of the table: its header, its value for a run or None, how people read it, and its standard error if it
    has one."""

    header: str
    of: Callable[[RunRecord], Any]
    show: Callable[[Any], str] = str
    error: Callable[[RunRecord], float | None] = lambda run: None

    def text(self, group: Group) -> str:
        """The value of a run and its error, or the mean over several runs and their standard deviation."""
        values = [value for run in group.runs if (value := self.of(run)) is not None]
        if not values:
            return ""
        if self.header == "run":
            return group.name
        if len(group.runs) == 1:
            error = self.error(group.runs[0])
            return self.show(values[0]) + ("" if error is None else f" ± {self.show(error)}")
        if any(isinstance(value, str | bool) for value in values):
            return ", ".join(dict.fromkeys(self.show(value) for value in values))
        mean, spread = mean_and_spread(values)
        shown = self.show(round(mean) if isinstance(values[0], int) else mean)
        return f"{shown} ± {self.show(round(spread) if isinstance(values[0], int) else spread)}" if spread else shown


def _last(header: str, name: str) -> Column:
    """The newest value of a metric."""
    return Column(header, lambda run: run.last(name), metric(name).text)


COLUMNS = [
    Column("run", lambda run: run.name),
    Column("stage", lambda run: run.stage),
    Column("complete", lambda run: bool(run.summary), lambda done: "yes" if done else "no"),
    Column("parameters", lambda run: run.summary.get("parameters"), short),
    Column("trained", RunRecord.trained, short),
    Column("steps", lambda run: run.last("step"), metric("step").text),
    _last("tokens", "tokens"),
    _last("time", "seconds"),
    Column("tokens/s", RunRecord.speed, metric("train/tokens_per_second").text),
    Column("scored tokens/s", RunRecord.scored_speed, metric("train/scored_tokens_per_second").text),
    Column("peak memory", lambda run: run.summary.get("peak_memory_bytes"), memory),
    _last("train loss", "train/loss"),
    _last("val loss", "val/loss"),
    Column("best val loss", lambda run: run.least("val/loss"), metric("val/loss").text),
    Column("best at step", RunRecord.best_step, metric("step").text),
    _last("perplexity", "val/perplexity"),
    _last("bits/byte", "val/bits_per_byte"),
    _last("token accuracy", "val/token_accuracy"),
]


def mixed_columns(runs: Sequence[RunRecord]) -> list[Column]:
    """A column for the validation loss of each set that any run mixes in (`val_pretraining/loss`...)."""
    return [_last(name, name) for name in _names(runs, lambda name: bool(re.fullmatch(r"val_\w+/loss", name)))]


def accuracy_columns(runs: Sequence[RunRecord]) -> list[Column]:
    """A column for each task's accuracy and chance (`mathqa/accuracy`...) that any run has."""
    return [
        replace(_last(name, name), error=lambda run, name=name: run.last(error_of(name)))
        for name in _names(runs, is_task_share)
    ]


def _names(runs: Sequence[RunRecord], wanted: Callable[[str], bool]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for row in run.rows for name in row if wanted(name)))


def as_csv(columns: Sequence[Column], runs: Sequence[RunRecord]) -> str:
    """A line per run with full-precision values and errors; runs of a `group` differ only in `seed`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    errors = [column for column in columns if any(column.error(run) is not None for run in runs)]
    more = [f"{column.header}_error" for column in errors]
    writer.writerow([*(column.header for column in columns), *more, "group", "seed"])
    names = {id(run): group.name for group in grouped(runs) for run in group.runs}
    for run in runs:
        values = [*(column.of(run) for column in columns), *(column.error(run) for column in errors)]
        writer.writerow([*values, names[id(run)], run.config.get("seed")])
    return text.getvalue()
