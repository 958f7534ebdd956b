"""What a person sees while a run goes: a bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TextIO, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")

_REFRESH_SECONDS = 0.2
_SAMPLE_WIDTH = 240  # characters; samples.jsonl has the whole text
_HIDDEN = (
    "step",
    "tokens",
    "seconds",
    "time/evaluation",
    "time/samples",
    "time/compilation",
    "time/checkpoint",
    "val/tokens",
    "mathqa/problems",
    "preference/pairs",
    "preference/reward_chosen",
    "preference/reward_rejected",
    "train/reward_chosen",
    "train/reward_rejected",
    "mathqa/questions",
    "gsm8k/questions",
    "train/scored_tokens_per_second",
    "train/skipped_steps",
    "train/loss_scale",
    "train/overflows",
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Screen:
    """Shows progress and rows of figures; `bar` says whether `console` is a terminal that can redraw a line."""

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
        """Keep the validation loss, which the bar shows until there is a newer one."""
        self._val_loss = metrics.get("val/loss", self._val_loss)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show one row of figures; on a terminal the bar already shows those of training."""
        self.remember(metrics)
        training = any(name.startswith("train/") for name in metrics)
        if self._with_bar and training and all(name.startswith("train/") or name in _HIDDEN for name in metrics):
            return
        before, after = ([self._percent], [self._left]) if training else ([], [])
        self.message("  ".join(filter(None, [f"step {step:>6,}", *before, *_figures(metrics), *after])))

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Show the beginning of a text that the model wrote, on one line, its prompt set apart."""
        shown = " ".join(text.split())
        space = " " if text[:1].isspace() else ""
        after = escape(self._printable(space + shown[:_SAMPLE_WIDTH] + (" ..." if len(shown) > _SAMPLE_WIDTH else "")))
        before = escape(self._printable(prompt))
        self._print(f"[dim]sample at step {step:,}:[/dim] [bold]{before}[/bold]{after}", markup=True)

    def message(self, text: str) -> None:
        """Show a line, above the bar where there is one."""
        self._print(self._printable(text), markup=False)

    def close(self) -> None:
        """Leave the bar as it stands and give the terminal back; the next progress opens a new one."""
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
            # No thread redraws it: every step does, and a thread would compete with the training for the interpreter.
            self._bar = Progress(*columns, console=self._console, auto_refresh=False, expand=True)
            self._task = self._bar.add_task(self._title, total=1.0, figures="")
            self._bar.start()
        return self._bar

    def _print(self, text: str, markup: bool) -> None:
        self._console.print(text, markup=markup, highlight=False, soft_wrap=True, emoji=False)

    def _printable(self, text: str) -> str:
        return printable(text, self._console.encoding)


def printable(text: str, encoding: str | None) -> str:
    """`text` without what would move the cursor or what the terminal's encoding lacks: models write anything."""
    encoding = encoding or "utf-8"
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text).encode(encoding, "replace").decode(encoding)


def counted(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """`items`, counted by a bar on the terminal that is gone when they are done; elsewhere nothing is shown."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from items
        return
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        yield from bar.track(items, total=total)


def open_screen(title: str, file: TextIO | None = None) -> Screen:
    """A screen on `file` (standard output): a bar where that is a terminal, else plain lines."""
    console = Console(file=file)
    return Screen(title, console, bar=console.file.isatty() and not console.is_dumb_terminal)


def _figures(metrics: Mapping[str, float]) -> Iterator[str]:
    """Each figure as a person reads it, its standard error (`NAME_error`) beside it."""
    for name, value in metrics.items():
        if name in _HIDDEN or (name.endswith("_error") and name.removesuffix("_error") in metrics):
            continue
        error = metrics.get(f"{name}_error")
        yield show(name, value) if error is None else f"{show(name, value)} ± {show_error(name, error)}"


def show(name: str, value: float) -> str:
    """A figure as a person reads it: `validation loss 3.412`, `lr 9.8e-04`, `12,345 tokens/s`, `accuracy 43.7%`."""
    if not _known(value):
        return f"{name} {value}"
    match name:
        case "train/loss":
            return f"loss {value:.4f}"
        case "train/lr":
            return f"lr {value:.2e}"
        case "train/grad_norm":
            return f"grad norm {value:.2f}"
        case "train/tokens_per_second":
            return f"{value:,.0f} tokens/s"
        case "train/mfu":
            return f"mfu {value:.1%}"
        case "val/loss":
            return f"validation loss {value:.4f}"
        case "val/perplexity":
            return f"perplexity {value:,.2f}"
        case "val/bits_per_byte":
            return f"bits/byte {value:.4f}"
        case "val/token_accuracy":
            return f"token accuracy {value:.1%}"
        case _ if "accuracy" in name or name.endswith(("/chance", "/unanswered")):
            return f"{name} {value:.1%}"
        case _:
            return f"{name} {value:,}" if float(value).is_integer() else f"{name} {value:.4g}"


def show_error(name: str, error: float) -> str:
    """The standard error of a figure, with the figure's unit."""
    return f"{error:.1%}" if "accuracy" in name else f"{error:.4f}"


def duration(seconds: float) -> str:
    """`42s`, `4m12s`, `2h03m`, `3d04h`: the two largest units."""
    whole = round(max(0.0, seconds))
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02d}{smaller}"
    return f"{whole}s"


def _time_left(elapsed: float, done: float, remaining: float) -> str:
    """From how long this session took for the share that it did; empty while that says nothing."""
    return f"{duration(elapsed / done * max(0.0, remaining))} left" if done > 0 and elapsed > 0 else ""


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def short(value: float) -> str:
    """Three digits: `950`, `12.3k`, `4.18M`, `1.31B`."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"
