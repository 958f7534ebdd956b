"""Progress bars for work outside of training: on standard error, on a terminal, once the work has taken two seconds;
they vanish when it is done.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pretune.core.terminal import shown

SHOW_AFTER_SECONDS = 2.0

T = TypeVar("T")


class Bar:
    """A bar of rich's `columns`, which may read further fields of what `update` is given."""

    def __init__(self, title: str, total: float | None, *columns: Any, **fields: Any) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(20), *columns, console=console, transient=True
        )
        self._task = self._progress.add_task(shown(title), total=total, **fields)
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress.live.is_started:  # stopping a bar that never started prints an empty line
            self._progress.stop()

    @property
    def seconds(self) -> float:
        """Time since the bar was made."""
        return time.monotonic() - self._started

    def update(self, completed: float, **fields: Any) -> None:
        """Move the bar to `completed`."""
        self._progress.update(self._task, completed=completed, **fields)
        console = self._progress.console
        if self.seconds > SHOW_AFTER_SECONDS and console.is_terminal and not self._progress.live.is_started:
            self._progress.start()


class PreparationBar(Bar):
    """Counts rows and tokens, with tokens per second."""

    def __init__(self, title: str) -> None:
        text = "{task.completed:,} rows, {task.fields[tokens]:,} tokens, {task.fields[rate]:,.0f} tokens/s"
        super().__init__(f"preparing {title[:60]}", None, TextColumn(text), TimeElapsedColumn(), tokens=0, rate=0.0)
        self._tokens = 0

    def advance(self, num_rows: int, new_tokens: int) -> None:
        """`num_rows` rows are done, and the newest of them came to `new_tokens` tokens."""
        self._tokens += new_tokens
        self.update(num_rows, tokens=self._tokens, rate=self._tokens / max(self.seconds, 1e-9))


def counted(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """`items`, counted by a bar."""
    with Bar(title, total, MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        for done, item in enumerate(items, start=1):
            yield item
            bar.update(done)
