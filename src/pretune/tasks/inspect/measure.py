"""Measure candidates on the data of a run file: a run each, of the same number of seconds, in a process of its own."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import MofNCompleteColumn, TextColumn, TimeElapsedColumn

from pretune.core.config import UserError, validate
from pretune.core.files import fingerprint
from pretune.core.progress_bar import Bar
from pretune.model.config import ModelConfig
from pretune.run.config import RunConfig
from pretune.run.folder import RunFolder
from pretune.run.weights import find_start, model_section, own_folder
from pretune.tasks.inspect.candidates import Candidate, Compose
from pretune.tasks.inspect.child import ERROR, LOG, OUTCOME, SPEED, measure, outcome
from pretune.tracker.files import first_value, read_rows
from pretune.training.signals import Interrupts, Stop

FOLDER = "candidates"
"""The runs of the candidates, in the folder of the run that compares them."""


@dataclass(frozen=True)
class Measured:
    """A candidate that was measured."""

    name: str
    folder: Path
    rows: list[dict[str, Any]]
    """metrics.jsonl of its run."""
    summary: dict[str, Any]
    generation: float
    """New tokens per second of one text."""

    def first(self, name: str) -> Any:
        """The first value of a metric, or None: of a validation metric, that before training."""
        return first_value(self.rows, name)

    def last(self, name: str) -> Any:
        """The newest value of a metric, or None."""
        return first_value(reversed(self.rows), name)

    def over_time(self, name: str) -> tuple[list[float], list[float]]:
        """Seconds of training, and the value of a metric, wherever it was measured."""
        points = [(row.get("seconds", 0.0), row[name]) for row in self.rows if row.get(name) is not None]
        return [x for x, _ in points], [y for _, y in points]


@dataclass(frozen=True)
class Measurements:
    """What was measured, and why the other candidates were not. stopped: a signal came before the last of them."""

    done: list[Measured]
    errors: dict[str, str]
    stopped: bool


def measure_all(config: RunConfig, candidates: Sequence[Candidate], compose: Compose) -> Measurements:
    """Measure the candidates one after the other; what an earlier command has measured is taken from its files."""
    done: list[Measured] = []
    errors: dict[str, str] = {}
    try:
        with Interrupts(), _bar(len(candidates)) as bar:
            for number, candidate in enumerate(candidates):

                def show(number: int = number, name: str = candidate.name) -> None:
                    bar.update(number, name=name)

                try:
                    found = _measured(config, candidate, compose, show)
                except UserError as error:
                    errors[candidate.name] = " ".join(str(error).split())
                    continue
                if isinstance(found, str):
                    errors[candidate.name] = found
                else:
                    done.append(found)
    except Stop:
        return Measurements(done, errors, True)
    return Measurements(done, errors, False)


def _bar(total: int) -> Bar:
    return Bar(
        "measuring", total, MofNCompleteColumn(), TextColumn("{task.fields[name]}"), TimeElapsedColumn(), name=""
    )


def _measured(config: RunConfig, candidate: Candidate, compose: Compose, show: Callable[[], None]) -> Measured | str:
    """What was measured of a candidate, or why it was not."""
    show()
    mapping = settings(config, candidate, compose)
    validate(RunConfig, mapping)
    folder = Path(mapping["output_dir"]) / mapping["name"]
    found = outcome(folder)
    if found is None or ERROR in found:
        (folder / OUTCOME).unlink(missing_ok=True)
        code = _in_a_process(mapping, folder, show)
        found = outcome(folder) or {ERROR: f"its process ended with {_ending(code)}; see {folder / LOG}"}
    if ERROR in found:
        return str(found[ERROR])
    rows = read_rows(folder / "metrics.jsonl")
    return Measured(candidate.name, folder, rows, RunFolder(folder).complete() or {}, found[SPEED])


def settings(config: RunConfig, candidate: Candidate, compose: Compose) -> dict[str, Any]:
    """The configuration of a candidate's run: inspect.on, with the candidate and its tokenizer, for inspect.seconds of
    training, evaluated before the first step. Its name depends on all of that."""
    slug = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", candidate.name.removeprefix("model=")).strip("-._=,+")[-60:] or "model"
    place = own_folder(config).path / FOLDER
    more = [*candidate.overrides(), "task=train", f"name={slug}", f"output_dir={place}"]
    mapping = compose(config.inspect.on, more)
    if isinstance(candidate.source, ModelConfig):
        mapping["model"] = candidate.source.model_dump(mode="json")
    else:
        # All of it: what the run file says of its own model is no matter here.
        mapping["model"] = dict(model_section(find_start(mapping["stage"]["init_from"], Path(config.output_dir))))
        mapping["data"]["tokenizer"] = {"kind": "inherited", "add_tokens": []}
    mapping["budget"] |= {"steps": None, "tokens": None, "replay": None, "count": [], "time": config.inspect.seconds}
    mapping["evaluation"]["at_start"] = True
    mapping["early_stopping"]["patience"] = None
    mapping["samples"] |= {"every": None, "prompts": []}
    mapping["checkpoint"] |= {"every": None, "keep": 1, "keep_best": False, "use": "newest"}
    mapping |= {"tracker": {"kind": "none"}, "resume": "auto"}
    return mapping | {"name": f"{slug}-{fingerprint(mapping)[:8]}"}


def _in_a_process(mapping: dict[str, Any], folder: Path, show: Callable[[], None]) -> int | None:
    """Measure a candidate in a new process and return its exit code; a signal ends it, with its run saved."""
    process = multiprocessing.get_context("spawn").Process(target=measure, args=(mapping, folder))
    process.start()
    try:
        while process.is_alive():
            process.join(0.2)
            show()
    except Stop:
        process.terminate()
        process.join()
        raise
    return process.exitcode


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {-code}" + (" (the system's, when memory runs out)" if code == -9 else "")
    return f"exit code {code}"
