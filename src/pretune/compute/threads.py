"""CPU threads, and detection of other processes that compete for the same cores."""

from __future__ import annotations

import time
from pathlib import Path

CROWDED = 0.7
"""CoreShare below which other processes slow this one down considerably: torch's threads wait for each other, so one
shared core holds up all of them."""


class CoreShare:
    """The fraction of the CPU time wanted by this process that it got, since this object was created.

    On Linux it comes from the scheduler's statistics of each thread: time running, and time waiting for a core.
    Elsewhere it is the fraction of time that the main thread, which is never idle in training, was running.
    """

    def __init__(self, threads: Path = Path("/proc/self/task")) -> None:
        """threads: where Linux has a folder for each thread of this process."""
        self._threads, self._before = threads, _scheduled(threads)
        self._clock, self._main = time.perf_counter(), time.thread_time()

    def value(self) -> float:
        """The fraction so far, from 0 to 1; 1 if nothing else competes."""
        ran, waited = (now - before for now, before in zip(_scheduled(self._threads), self._before, strict=True))
        if ran > 0:
            return ran / (ran + max(waited, 0.0))
        elapsed = time.perf_counter() - self._clock
        return min((time.thread_time() - self._main) / elapsed, 1.0) if elapsed > 0 else 1.0


def use_threads(threads: int | None) -> None:
    """Set torch's number of CPU threads; None keeps torch's default."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _scheduled(threads: Path) -> tuple[float, float]:
    """Seconds that all threads of this process have been running, and waiting for a core; zeros if unknown."""
    ran = waited = 0
    for thread in threads.glob("*/schedstat"):
        try:
            on_core, in_queue, _ = thread.read_text().split()
        except (OSError, ValueError):
            continue  # the thread has just ended
        ran, waited = ran + int(on_core), waited + int(in_queue)
    return ran / 1e9, waited / 1e9
