"""Where a run's metrics go: its own folder, the console and, if asked for, wandb."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pretune.core.files import write_sealed
from pretune.tracker.config import TrackerConfig
from pretune.tracker.console import Screen, open_screen
from pretune.tracker.environment import environment
from pretune.tracker.files import JsonLines, json_ready, read_rows
from pretune.tracker.wandb_run import STOPPED, WandbRun

RECORDED = "recorded"
"""The key of summary.json for how much was recorded."""


def changed_since(folder: Path, recorded: Mapping[str, int]) -> list[Path]:
    """The files of rows in a run's folder that no longer hold what was recorded there."""
    files = (JsonLines(folder / "metrics.jsonl"), JsonLines(folder / "samples.jsonl"))
    return [file.path for file in files if not file.holds(recorded)]


class NoTracker:
    """In place of a Tracker where another process has it: takes everything and shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def rewind(self, step: int, recorded: Mapping[str, int]) -> None:
        pass

    def recorded(self) -> dict[str, int]:
        return {}

    def progress(self, step: int, fraction: float, loss: float, tokens_per_second: float) -> None:
        pass

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def sample(self, step: int, prompt: str, text: str) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def messages(self, texts: Iterable[str]) -> None:
        for _ in texts:  # they are made as they are asked for, and some raise
            pass

    def finish(self, summary: Mapping[str, Any]) -> None:
        pass


class Tracker:
    """Takes every metric of one run, as a context: leaving it gives the terminal back and closes wandb's run.

    folder: the run's folder; name: the run's name; job_type: the kind of its stage; settings: the resolved
    configuration; screen: None is standard output.
    """

    def __init__(
        self,
        config: TrackerConfig,
        folder: Path,
        name: str,
        job_type: str,
        settings: Mapping[str, Any],
        screen: Screen | None = None,
    ) -> None:
        self._folder = folder
        self._name = name
        self._job_type = job_type
        self._metrics = JsonLines(folder / "metrics.jsonl")
        self._samples = JsonLines(folder / "samples.jsonl")
        self._screen = screen or open_screen(job_type)
        self._wandb: WandbRun | None = None
        if config.kind == "wandb":
            self._wandb = WandbRun(config, folder, name, job_type, settings, self._screen.message)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close({}, 1 if isinstance(error, Exception) else STOPPED)

    def recorded(self) -> dict[str, int]:
        """How much has been recorded, and its checksums: what `rewind` wants to know, JSON-like."""
        return {name: value for file in (self._metrics, self._samples) for name, value in file.recorded().items()}

    def rewind(self, step: int, recorded: Mapping[str, int]) -> None:
        """Forget what was recorded after `step`, on a resume from there, or later than `recorded`, for some of a step's
        rows may be older than a checkpoint of it and others not; -1 forgets everything."""
        for file in (self._metrics, self._samples):
            if not file.rewind(step, recorded):
                self.message(f"note: {file.path} is not what the run wrote: what is missing there stays missing")
        rows = read_rows(self._metrics.path) if self._metrics.path.is_file() else []
        for row in rows:
            self._screen.remember(row)

    def progress(self, step: int, fraction: float, loss: float, tokens_per_second: float) -> None:
        """Move the bar: `fraction` of the budget is spent after `step` steps; loss in nats per token, or NaN."""
        self._screen.progress(step, fraction, loss, tokens_per_second)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record one row: `metrics` by name (`train/loss`...), tokens and seconds among them."""
        row = {"step": step, **metrics}
        self._metrics.append(row)
        if self._wandb is not None:
            self._wandb.log(row)
        self._screen.report(step, metrics)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Record what the model wrote after `prompt`."""
        self._samples.append({"step": step, "prompt": prompt, "text": text})
        if self._wandb is not None:
            self._wandb.sample(step, prompt, text)
        self._screen.sample(step, prompt, text)

    def message(self, text: str) -> None:
        """Show one line; nothing is recorded."""
        self._screen.message(text)

    def messages(self, texts: Iterable[str]) -> None:
        """Show each of them."""
        for text in texts:
            self.message(text)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, which marks the run complete: `summary` and what it was computed with.

        `summary["device"]` (`cpu`, `cuda:0`...) is where it was computed.
        """
        record = json_ready({"name": self._name, "stage": self._job_type, **summary})
        record_of_files = {RECORDED: self.recorded()}
        write_sealed(self._folder / "summary.json", {**record, **environment(record.get("device")), **record_of_files})
        self._close(record, 0)

    def _close(self, summary: Mapping[str, Any], exit_code: int) -> None:
        self._screen.close()
        if self._wandb is not None:
            self._wandb.finish(summary, exit_code)
            self._wandb = None
