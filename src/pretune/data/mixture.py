"""Mix several data sets with given shares; the order remains a pure function of seed, epoch and position."""

from __future__ import annotations

import math

import numpy as np

from pretune.core.batch import Batch
from pretune.data.config import DataConfig
from pretune.data.loader import Loader, as_batch, padding
from pretune.data.shards import Prepared

RESOLUTION = 1000
"""Shares are rounded to multiples of one over this number."""


class Mixture:
    """Sequences from a main loader and others, interleaved so that every prefix is as close to the shares as possible.

    A repeating cycle of at most RESOLUTION sequences defines which set each sequence comes from; each set goes through
    its own epochs. One epoch of the mixture reads the main set once.
    """

    def __init__(self, main: Loader, others: dict[str, tuple[Loader, float]]) -> None:
        self._main, self._others = main, {name: loader for name, (loader, _) in others.items()}
        counts = [round(RESOLUTION * share) for _, share in others.values()]
        counts = np.array([RESOLUTION - sum(counts), *counts])
        self._counts = counts // math.gcd(*counts.tolist())
        self._owners, self._ranks = evenly(self._counts)
        self.num_sequences = -(-main.num_sequences * len(self._owners) // int(self._counts[0]))

    def batch(self, position: int, num_sequences: int) -> Batch:
        """Sequences `position` to `position + num_sequences` of the endless stream, at equal cost for any position."""
        loaders = [self._main, *self._others.values()]
        isolate = any(loader.isolate for loader in loaders)
        main = self._main
        sequences = padding(num_sequences, main.length, main.eos_id, isolate, main.reference)
        cycles, offsets = np.divmod(np.arange(position, position + num_sequences), len(self._owners))
        owners = self._owners[offsets]
        own_positions = cycles * self._counts[owners] + self._ranks[offsets]
        for number, loader in enumerate(loaders):
            places = np.flatnonzero(owners == number)
            loader.fill(own_positions[places], sequences, places.tolist())
        return as_batch(sequences)

    def metrics(self) -> dict[str, int]:
        """Metrics of what training does not see, of the main set (`data/...`) and of each other (`data_NAME/...`)."""
        metrics = self._main.metrics()
        for name, loader in self._others.items():
            metrics |= {key.replace("data/", f"data_{name}/"): value for key, value in loader.metrics().items()}
        return metrics

    def notes(self) -> list[str]:
        """The same as text; empty if nothing is left out."""
        others = [f"{name}: {note}" for name, loader in self._others.items() for note in loader.notes()]
        return self._main.notes() + others


def training_loader(data: Prepared, config: DataConfig, seed: int) -> Loader | Mixture:
    """The loader for training: of the main set, or of the mixture that `config` describes."""
    main = Loader(data.train, config, seed)
    if not config.mix:
        return main
    parts = {name: Loader(data.parts[name].train, config.part(name), seed) for name in config.mix}
    return Mixture(main, {name: (loader, config.mix[name].share) for name, loader in parts.items()})


def evenly(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A cycle of sum(counts) places in which set k has counts[k] evenly spread places. Returns the set of each place,
    and the rank of each place among those of its set.

    Each place goes to the set that is furthest behind its share (smooth weighted round-robin).
    """
    owners = np.empty(counts.sum(), dtype=np.int64)
    ranks = np.empty_like(owners)
    credit, used = np.zeros_like(counts), np.zeros_like(counts)
    for place in range(len(owners)):
        credit += counts
        owner = int(credit.argmax())
        credit[owner] -= len(owners)
        owners[place], ranks[place] = owner, used[owner]
        used[owner] += 1
    return owners, ranks
