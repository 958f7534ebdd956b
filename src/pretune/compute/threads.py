"""Threads of the CPU, and whether somebody else wants the same cores."""

from __future__ import annotations

import time
from pathlib import Path

CROWDED = 0.7
"""Share of the wanted time below which other work is slowing this process down: torch's threads wait for each other, so
that a core that is shared holds up all of them."""

_THREADS = Path("/proc/self/task")


class CoreShare:
    """How much of the time in which this process wanted to compute it was let, since this was made.

    On Linux from the scheduler's own account of each thread: time on a core, and time in the queue for one. Elsewhere,
    the time that the main thread, which is never idle in training, had on a core.
    """

    def __init__(self) -> None:
        self._before = _scheduled()
        self._clock, self._main = time.perf_counter(), time.thread_time()

    def value(self) -> float:
        """Between 0 and 1; 1 for a machine of one's own."""
        ran, waited = (now - before for now, before in zip(_scheduled(), self._before, strict=True))
        if ran > 0:
            return ran / (ran + max(waited, 0.0))
        elapsed = time.perf_counter() - self._clock
        return min((time.thread_time() - self._main) / elapsed, 1.0) if elapsed > 0 else 1.0


def use_threads(threads: int | None) -> None:
    """Let torch compute with so many threads of the CPU; None leaves it as many as it takes by itself."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _scheduled() -> tuple[float, float]:
    """Seconds that all threads of this process have run, and have waited for a core; zeros where nobody tells."""
    ran = waited = 0
    for thread in _THREADS.glob("*/schedstat"):
        try:
            on_core, in_queue, _ = thread.read_text().split()
        except (OSError, ValueError):
            continue  # it has just ended
        ran, waited = ran + int(on_core), waited + int(in_queue)
    return ran / 1e9, waited / 1e9
