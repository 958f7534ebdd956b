"""Console output of a run: a progress bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from pretune.core.terminal import printable
from pretune.core.units import duration, short
from pretune.tracker.metrics import error_of, metric

_REFRESH_SECONDS = 0.2
_SAMPLE_WIDTH = 240  # characters; samples.jsonl has the whole text


class Screen:
    """Shows progress and metrics; `bar`: whether `console` is a terminal that can redraw a line."""

    def __init__(self, title: str, console: Console, bar: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._title = title
        self._console = console
        self._with_bar = bar
        self._clock = clock
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._start: tuple[float, float] | None = None
        self._drawn = -math.inf
        self._percent = ""
        self._left = ""
        self._val_loss: float | None = None

    def progress(self, step: int, fraction: float, loss: float, tokens_per_second: float) -> None:
        """Move the bar: `fraction` of the budget is spent after `step` steps. Cheap enough for every step.

        A loss that is not known yet is NaN.
        """
        now = self._clock()
        self._start = self._start or (now, fraction)
        self._percent = f"{min(fraction, 1):4.0%}"
        self._left = _time_left(now - self._start[0], fraction - self._start[1], 1 - fraction)
        if not self._with_bar or (now - self._drawn < _REFRESH_SECONDS and fraction < 1):
            return
        self._drawn = now
        losses = [f"{name} {value:.3f}" for name, value in (("loss", loss), ("val", self._val_loss)) if _known(value)]
        speed = f"{short(tokens_per_second)} tok/s" if _known(tokens_per_second) else ""
        figures = " ".join(filter(None, [f"step {step:,}", *losses, speed, self._left]))
        self._ensure_bar().update(self._task, completed=fraction, figures=figures, refresh=True)

    def remember(self, metrics: Mapping[str, float]) -> None:
        """Keep the validation loss for the bar until there is a newer one."""
        self._val_loss = metrics.get("val/loss", self._val_loss)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show one row of metrics; on a terminal the bar already shows those of training."""
        self.remember(metrics)
        training = any(name.startswith("train/") for name in metrics)
        others = [name for name in metrics if not name.startswith("train/") and metric(name).on_console]
        if self._with_bar and training and not others:
            return
        before, after = ([self._percent], [self._left]) if training else ([], [])
        self.message("  ".join(filter(None, [f"step {step:>6,}", *before, *_lines(metrics), *after])))

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Show the beginning of a generated text on one line, with its prompt in bold."""
        shown = " ".join(text.split())
        space = " " if text[:1].isspace() else ""
        after = escape(self._printable(space + shown[:_SAMPLE_WIDTH] + (" ..." if len(shown) > _SAMPLE_WIDTH else "")))
        before = escape(self._printable(prompt))
        self._print(f"[dim]sample at step {step:,}:[/dim] [bold]{before}[/bold]{after}", markup=True)

    def message(self, text: str) -> None:
        """Show a line, above the bar where there is one."""
        self._print(self._printable(text), markup=False)

    def close(self) -> None:
        """Stop the bar and restore the terminal; the next progress opens a new bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _ensure_bar(self) -> Progress:
        if self._bar is None:
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                TaskProgressColumn(),
                TextColumn("{task.fields[figures]}"),
            )
            # Redrawn by every step, not by a thread, which would compete with training for the interpreter.
            self._bar = Progress(*columns, console=self._console, auto_refresh=False, expand=True)
            self._task = self._bar.add_task(self._title, total=1.0, figures="")
            self._bar.start()
        return self._bar

    def _print(self, text: str, markup: bool) -> None:
        self._console.print(text, markup=markup, highlight=False, soft_wrap=True, emoji=False)

    def _printable(self, text: str) -> str:
        return printable(text, self._console.encoding)


def open_screen(title: str, file: TextIO | None = None) -> Screen:
    """A screen on `file` (default: standard output): a bar if it is a terminal, else plain lines."""
    console = Console(file=file)
    return Screen(title, console, bar=console.file.isatty() and not console.is_dumb_terminal)


def _lines(metrics: Mapping[str, float]) -> Iterator[str]:
    """Each metric as people read it, its standard error beside it."""
    for name, value in metrics.items():
        known = metric(name)
        if known.on_console and not (name.endswith("_error") and name.removesuffix("_error") in metrics):
            yield known.line(value, metrics.get(error_of(name)))


def _time_left(elapsed: float, done: float, remaining: float) -> str:
    """Extrapolated from this session's speed; empty while it is unknown."""
    return f"{duration(elapsed / done * max(0.0, remaining))} left" if done > 0 and elapsed > 0 else ""


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
