"""task=inspect: compare models in a table and, on a run's data, by measurement."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pretune.core.config import ConfigError, InputError, UserError, validate
from pretune.core.files import write_atomic
from pretune.core.progress_bar import counted
from pretune.core.tables import as_markdown, show_table
from pretune.core.terminal import say, warn
from pretune.core.units import memory
from pretune.run.config import RunConfig
from pretune.run.weights import own_folder
from pretune.tasks.inspect.candidates import Candidate, Compose, find
from pretune.tasks.inspect.facts import facts_of
from pretune.tasks.inspect.figure import draw_tradeoff
from pretune.tasks.inspect.measure import Measured, measure_all
from pretune.tasks.inspect.measured_table import MeasuredRow, fitting, measured_columns
from pretune.tasks.inspect.memory import Machine, machine_of
from pretune.tasks.inspect.table import Column, Row, as_csv, columns, texts
from pretune.tasks.report.page import Picture, Section, page
from pretune.training.signals import EXIT_STOPPED

TABLE, MEASURED, PICTURE, PAGE = "models", "measured", "tradeoff.png", "inspect.html"
"""The files that are written into the run's folder; of tables, .md and .csv."""


@dataclass
class Found:
    """The candidates that could be read, each with its row, and why the others could not."""

    candidates: list[Candidate] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)


def inspect(config: RunConfig, compose: Compose) -> int:
    """task=inspect: print the table of inspect.models and, with inspect.on, that of what was measured of them; write
    both as Markdown and CSV into the run's folder, with a picture and a page.

    A model that cannot be read or measured has a line that says why. Returns EXIT_STOPPED if a signal came before the
    last was measured. Raises InputError if none can be read or none measured, and where the files cannot be written;
    ConfigError if inspect.models is empty.
    """
    if not config.inspect.models:
        raise ConfigError(
            "task=inspect compares inspect.models, which is empty: name runs, folders, models on the hub (owner/name) "
            "or shapes (model=smollm_135m)"
        )
    machine = machine_of(_settings(config, compose), compose)
    found = _read(config, machine, compose)
    if not found.rows:
        raise InputError("\n".join(f"{name}: {error}" for name, error in found.errors.items()))
    folder = own_folder(config).path
    notes = [_memory_note(machine)] if any(row.needs for row in found.rows) else []
    _publish(folder / TABLE, columns(machine), found.rows, found.errors, notes)
    return 0 if config.inspect.on is None else _compare(config, found, machine, compose, folder)


def _settings(config: RunConfig, compose: Compose) -> RunConfig:
    """The settings that memory is estimated with: those of inspect.on, where models will train, if it is given."""
    if config.inspect.on is None:
        return config
    return validate(RunConfig, compose(config.inspect.on, [])).model_copy(update={"inspect": config.inspect})


def _read(config: RunConfig, machine: Machine, compose: Compose) -> Found:
    found, names = Found(), list(dict.fromkeys(config.inspect.models))
    for name in counted(names, "reading models", len(names)):
        try:
            candidate = find(name, config.output_dir, compose)
            facts = facts_of(candidate)
            found.rows.append(Row(facts, None if facts.model is None else machine.needs(facts.model)))
            found.candidates.append(candidate)
        except UserError as error:
            found.errors[name] = " ".join(str(error).split())
    return found


def _compare(config: RunConfig, found: Found, machine: Machine, compose: Compose, folder: Path) -> int:
    """Measure the candidates on the data of inspect.on, and show which is how good and how fast."""
    of_name = {row.facts.name: row for row in found.rows}
    unbuilt = {row.facts.name: row.facts.nobody for row in found.rows if row.facts.nobody is not None}
    results = measure_all(config, [one for one in found.candidates if one.name not in unbuilt], compose)
    errors = unbuilt | results.errors
    if not results.done:
        if results.stopped:
            say("stopped before anything was measured; run the same command to go on")
            return EXIT_STOPPED
        raise InputError("\n".join(f"{name}: {error}" for name, error in errors.items()))
    rows = [_measured_row(one, of_name[one.name], machine) for one in results.done]
    where = "here" if config.inspect.device is None else machine.name
    wanted = measured_columns(rows, config.inspect.seconds, where)
    notes = [
        f"Each was measured on the data of {config.inspect.on}, trained for {config.inspect.seconds:g} s as that says, "
        "and measured again. Bits per byte (less is better) compare models of any tokenizer. Generation: one text."
    ]
    say()
    _publish(folder / MEASURED, wanted, rows, errors, notes)
    picture = draw_tradeoff(results.done)
    shown = Picture(picture, "Quality over seconds of training, and over tokens generated per second")
    tables = [texts(wanted, rows), texts(columns(machine), found.rows)]
    write_files(folder, {PICTURE: picture, PAGE: page([shown], tables, [_section(one) for one in results.done])})
    say(f"the trade-off: {folder / PICTURE}, all of it on one page: {folder / PAGE}")
    if results.stopped:
        say("stopped; what was measured is kept, run the same command to go on")
        return EXIT_STOPPED
    return 0


def _measured_row(one: Measured, row: Row, machine: Machine) -> MeasuredRow:
    return MeasuredRow(one, row.facts.shape.parameters, fitting(row.needs, machine.usable))


def _section(one: Measured) -> Section:
    text = (one.folder / "config.yaml").read_text(encoding="utf-8")
    return Section(one.name, "", text, (), one.summary)


def _publish(
    path: Path, wanted: Sequence[Column], rows: Sequence[object], errors: Mapping[str, str], notes: Sequence[str]
) -> None:
    """Print a table with its notes and what it lacks, and write it as Markdown and CSV."""
    header, body = texts(wanted, rows)
    show_table(header, body)
    for note in notes:
        say(note)
    for name, error in errors.items():
        warn(f"{name}: {error}")
    lacking = "".join(f"- {name}: {error}\n" for name, error in errors.items())
    text = "\n".join([as_markdown(header, body), *(f"{note}\n" for note in notes), *([lacking] if lacking else [])])
    write_files(path.parent, {f"{path.name}.md": text, f"{path.name}.csv": as_csv(wanted, rows, errors)})
    say(f"written to {path}.md and {path}.csv")


def _memory_note(machine: Machine) -> str:
    return (
        f"Memory: estimated for sequences of {machine.context:,} tokens, one in a micro-batch, uncompiled; "
        f"{machine.name} has {memory(machine.usable)} for tensors. Generation: one text, weights in 16 bits."
    )


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Write files into a folder; InputError if that fails."""
    try:
        for name, content in files.items():
            write_atomic(folder / name, content)
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({os.strerror(error.errno or 0).lower()})") from None
