"""Variants of tasks of grids: the eight symmetries of the square, permutations of colours, and orders of pairs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pretune.data.formats.grid_config import AugmentConfig
from pretune.data.formats.grids import Grid, GridTask, Pair
from pretune.data.hashing import hash_value


@dataclass(frozen=True)
class Variant:
    """A way to change all grids of a task, which can be undone."""

    turns: int
    """Quarter turns, counter-clockwise, from 0 to 3."""
    mirrored: bool
    """Whether left and right are exchanged, before it is turned."""
    colors: tuple[int, ...]
    """The new colour of each of the ten."""
    order: tuple[int, ...]
    """The places of the pairs, in their new order."""

    def apply(self, grid: Grid) -> Grid:
        cells = np.array(self.colors)[np.array(grid)]
        return _as_grid(np.rot90(np.fliplr(cells) if self.mirrored else cells, self.turns))

    def undo(self, grid: Grid) -> Grid:
        cells = np.rot90(np.argsort(self.colors)[np.array(grid)], -self.turns)
        return _as_grid(np.fliplr(cells) if self.mirrored else cells)

    def of_pair(self, pair: Pair) -> Pair:
        return Pair(self.apply(pair.input), None if pair.output is None else self.apply(pair.output))

    def of_task(self, task: GridTask) -> GridTask:
        """The task in this variant; its tests stay in their order."""
        train = tuple(self.of_pair(task.train[place]) for place in self.order)
        return GridTask(task.name, train, tuple(self.of_pair(pair) for pair in task.test))


def variants(task: GridTask, config: AugmentConfig) -> Iterator[Variant]:
    """The variants of a task, the unchanged one first. They depend on the seed and on the task's pairs alone."""
    places, colors = tuple(range(len(task.train))), tuple(range(10))
    yield Variant(0, False, colors, places)
    draw = random.Random(f"{config.seed} {hash_value([[pair.input, pair.output] for pair in task.train])}")
    fixed = {"none": 10, "all_but_0": 1, "all": 0}[config.colors]
    for _ in range(config.variants - 1):
        symmetry = draw.randrange(1, 8) if config.dihedral else 0
        permuted = (*colors[:fixed], *draw.sample(colors[fixed:], 10 - fixed))
        order = tuple(draw.sample(places, len(places))) if config.pair_order else places
        yield Variant(symmetry % 4, symmetry >= 4, permuted, order)


def leave_one_out(task: GridTask) -> Iterator[GridTask]:
    """A task for each pair, whose test it is and whose other pairs are shown; none for a task with a single pair."""
    for place, pair in enumerate(task.train if len(task.train) > 1 else ()):
        yield GridTask(task.name, task.train[:place] + task.train[place + 1 :], (pair,))


def _as_grid(cells: np.ndarray) -> Grid:
    return tuple(tuple(row) for row in cells.tolist())
