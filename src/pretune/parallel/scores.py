"""Scores of batches that the processes share out among themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from torch import Tensor

from pretune.core.batch import Batch
from pretune.parallel.processes import Processes


class SharedScores:
    """Batches and their scores, of which each process computes every n-th: all processes get all scores, in the order
    of one process alone, and so the same sums.

    Iterate over it, and call it with the batch that came last.
    """

    def __init__(self, score: Callable[[Batch], Any], batches: Iterable[Batch], processes: Processes) -> None:
        self._score, self._batches, self._processes = score, batches, processes
        self._ready: list[Any] = []

    def __iter__(self) -> Iterator[Batch]:
        batches, processes = iter(self._batches), self._processes
        while group := list(islice(batches, processes.count)):
            own = self._score(group[processes.rank]) if processes.rank < len(group) else None
            self._ready = [own] if processes.count == 1 else processes.gathered(own and _on_host(own))
            for batch in group:
                yield batch
                self._ready.pop(0)

    def __call__(self, batch: Batch) -> Any:
        return self._ready[0]


def _on_host(scores: Any) -> Any:
    return type(scores)(*(one.cpu() if isinstance(one, Tensor) else one for one in scores))
