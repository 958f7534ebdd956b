"""The progress bar of a preparation: rows, tokens, tokens a second. It shows only when the work takes a while."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

SHOW_AFTER_SECONDS = 2.0


class PreparationBar:
    """Counts what is done; on a terminal it becomes visible after two seconds, elsewhere never."""

    def __init__(self, title: str) -> None:
        self._progress = Progress(
            TextColumn("preparing {task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:,} rows, {task.fields[tokens]:,} tokens, {task.fields[rate]:,.0f} tokens/s"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task(title[:60], total=None, tokens=0, rate=0.0)
        self._tokens = 0
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress.live.is_started:  # stopping one that never started writes an empty line
            self._progress.stop()

    def advance(self, num_rows: int, new_tokens: int) -> None:
        """`num_rows` rows are done, and their last part came to `new_tokens` tokens."""
        self._tokens += new_tokens
        seconds = time.monotonic() - self._started
        self._progress.update(
            self._task, completed=num_rows, tokens=self._tokens, rate=self._tokens / max(seconds, 1e-9)
        )
        if seconds > SHOW_AFTER_SECONDS and self._progress.console.is_terminal and not self._progress.live.is_started:
            self._progress.start()
