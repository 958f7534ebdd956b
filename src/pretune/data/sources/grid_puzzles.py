"""Generate small tasks like those of the Abstraction and Reasoning Corpus: some pairs of grids, and one to transform.

All pairs of a task are made by one rule with one choice of its colours and directions. A test's input is not among the
task's other inputs, and no two tasks are equal.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pretune.core.config import InputError
from pretune.data.sources.config import GridPuzzlesSource

VERSION = 1
"""Increment when the same section would give different tasks: it is part of the cache key of prepared data."""

MAX_TRIES = 200
"""After this many draws in a row without a new task, all count as found."""

Grid = np.ndarray
"""Colours [rows, columns], 0 for the background."""

Rule = Callable[[Grid], Grid]


def rows(config: GridPuzzlesSource, max_tries: int = MAX_TRIES) -> Iterator[dict[str, Any]]:
    """`num_tasks` different rows {id, train, test}, determined by the seed.

    Raises InputError if there are not that many different tasks of this size.
    """
    draw = random.Random(config.seed)
    seen: set[str] = set()
    for count in range(config.num_tasks):
        for _ in range(max_tries):
            rule = draw.choice(tuple(RULES))
            pairs = _pairs(draw, config, rule)
            if pairs and (content := json.dumps(pairs)) not in seen:
                break
        else:
            raise InputError(
                f"grid_puzzles finds only {count} different tasks with grids up to {config.max_size}; lower "
                f"data.source.num_tasks ({config.num_tasks}) or raise data.source.max_size"
            )
        seen.add(content)
        yield {"id": f"{rule}-{count:05d}", "train": pairs[:-1], "test": pairs[-1:]}


def _pairs(draw: random.Random, config: GridPuzzlesSource, name: str) -> list[dict[str, Any]]:
    """The pairs of a new task of that rule, or none if too few inputs were found that it changes."""
    colors = draw.sample(range(1, 10), min(config.num_colors, 9))
    rule = RULES[name](draw, colors)
    inputs: list[Grid] = []
    for _ in range(20 * (config.num_pairs + 1)):
        grid = _object(draw, config, colors) if name == "crop" else _scattered(draw, config, colors)
        if not any(np.array_equal(grid, other) for other in inputs) and not np.array_equal(grid, rule(grid)):
            inputs.append(grid)
        if len(inputs) == config.num_pairs + 1:
            return [{"input": one.tolist(), "output": rule(one).tolist()} for one in inputs]
    return []


def _size(draw: random.Random, config: GridPuzzlesSource) -> tuple[int, int]:
    return draw.randint(config.min_size, config.max_size), draw.randint(config.min_size, config.max_size)


def _scattered(draw: random.Random, config: GridPuzzlesSource, colors: list[int]) -> Grid:
    """A grid with each colour in some of the cells."""
    height, width = _size(draw, config)
    cells = [draw.choice(colors) if draw.random() < 0.5 else 0 for _ in range(height * width)]
    for color, place in zip(colors, draw.sample(range(len(cells)), min(len(colors), len(cells))), strict=False):
        cells[place] = color
    return np.array(cells).reshape(height, width)


def _object(draw: random.Random, config: GridPuzzlesSource, colors: list[int]) -> Grid:
    """An empty grid with a rectangle of colours somewhere in it."""
    height, width = _size(draw, config)
    tall, wide = draw.randint(1, height), draw.randint(1, width)
    top, left = draw.randint(0, height - tall), draw.randint(0, width - wide)
    grid = np.zeros((height, width), dtype=int)
    for row in range(tall):
        for column in range(wide):
            grid[top + row, left + column] = draw.choice(colors)
    return grid


def _recolor(draw: random.Random, colors: list[int]) -> Rule:
    old, new = draw.choice(colors), draw.choice([color for color in range(1, 10) if color not in colors] or [0])
    return lambda grid: np.where(grid == old, new, grid)


def _swap(draw: random.Random, colors: list[int]) -> Rule:
    one, other = (colors * 2)[:2] if len(colors) < 2 else draw.sample(colors, 2)
    return lambda grid: np.select([grid == one, grid == other], [other, one], grid)


def _fill(draw: random.Random, colors: list[int]) -> Rule:
    new = draw.choice([color for color in range(1, 10) if color not in colors] or colors)
    return lambda grid: np.where(grid == 0, new, grid)


def _keep(draw: random.Random, colors: list[int]) -> Rule:
    kept = draw.choice(colors)
    return lambda grid: np.where(grid == kept, grid, 0)


def _move(draw: random.Random, colors: list[int]) -> Rule:
    axis, distance = draw.choice((0, 1)), draw.choice((-1, 1))
    return lambda grid: np.roll(grid, distance, axis)


def _fall(draw: random.Random, colors: list[int]) -> Rule:
    def fall(grid: Grid) -> Grid:
        # A stable sort by "is coloured": what is empty rises, and the colours of a column keep their order.
        return np.take_along_axis(grid, np.argsort(grid != 0, axis=0, kind="stable"), axis=0)

    return fall


def _crop(grid: Grid) -> Grid:
    down, across = np.nonzero(grid)
    return grid[down.min() : down.max() + 1, across.min() : across.max() + 1]


def _frame(draw: random.Random, colors: list[int]) -> Rule:
    color = draw.choice(colors)
    return lambda grid: np.pad(grid, 1, constant_values=color)


def _plain(rule: Rule) -> Callable[[random.Random, list[int]], Rule]:
    """A rule without anything to choose."""
    return lambda draw, colors: rule


RULES: dict[str, Callable[[random.Random, list[int]], Rule]] = {
    "mirror_sideways": _plain(np.fliplr),
    "mirror_upright": _plain(np.flipud),
    "turn": _plain(lambda grid: np.rot90(grid, -1)),
    "turn_over": _plain(lambda grid: np.rot90(grid, 2)),
    "transpose": _plain(np.transpose),
    "recolor": _recolor,
    "swap": _swap,
    "fill": _fill,
    "keep": _keep,
    "move": _move,
    "fall": _fall,
    "crop": _plain(_crop),
    "frame": _frame,
    "tile_sideways": _plain(lambda grid: np.tile(grid, (1, 2))),
    "tile_down": _plain(lambda grid: np.tile(grid, (2, 1))),
    "unfold": _plain(lambda grid: np.concatenate([grid, np.fliplr(grid)], axis=1)),
}
"""Rules by name: each draws what it leaves open, given the colours of the task."""
