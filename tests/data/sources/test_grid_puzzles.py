"""Generated tasks of grids: seeded, all different, and each made by one rule."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretune.core.config import ConfigError, InputError, validate
from pretune.data.sources.config import GridPuzzlesSource
from pretune.data.sources.grid_puzzles import RULES, rows

SECTION = {"kind": "grid_puzzles", "num_tasks": 300, "num_pairs": 3, "min_size": 2, "max_size": 4, "num_colors": 3,
           "seed": 1}  # fmt: skip


def puzzles(**changes: Any) -> list[dict[str, Any]]:
    return list(rows(validate(GridPuzzlesSource, SECTION | changes)))


def test_the_same_seed_gives_the_same_tasks_and_more_go_on() -> None:
    assert puzzles() == puzzles()
    assert puzzles() != puzzles(seed=2)
    assert puzzles(num_tasks=320)[:300] == puzzles()


def test_all_tasks_are_different_and_no_test_is_shown() -> None:
    found = puzzles()
    assert len({json.dumps([row["train"], row["test"]]) for row in found}) == len(found)
    assert {row["id"].rpartition("-")[0] for row in found} == set(RULES)
    for row in found:
        assert len(row["train"]) == 3
        assert row["test"][0]["input"] not in [pair["input"] for pair in row["train"]]
        assert all(pair["input"] != pair["output"] for pair in (*row["train"], *row["test"]))


def written(grid: Any) -> list[list[int]]:
    return [list(row) for row in grid]


OF_RULES: dict[str, Any] = {
    "mirror_sideways": lambda grid: [row[::-1] for row in grid],
    "mirror_upright": lambda grid: grid[::-1],
    "turn": lambda grid: zip(*grid[::-1], strict=True),
    "turn_over": lambda grid: [row[::-1] for row in grid[::-1]],
    "transpose": lambda grid: zip(*grid, strict=True),
    "tile_sideways": lambda grid: [row * 2 for row in grid],
    "tile_down": lambda grid: grid * 2,
    "unfold": lambda grid: [row + row[::-1] for row in grid],
    "fall": lambda grid: zip(*[sorted(column, key=bool) for column in zip(*grid, strict=True)], strict=True),
}
"""Rules that leave nothing open, with lists."""


def test_pairs_follow_their_rule() -> None:
    for row in puzzles():
        rule, pairs = row["id"].rpartition("-")[0], [*row["train"], *row["test"]]
        if rule in OF_RULES:
            assert all(pair["output"] == written(OF_RULES[rule](pair["input"])) for pair in pairs)
        elif rule in ("recolor", "swap", "fill", "keep"):  # one map of colours for all pairs
            lines = [line for pair in pairs for line in zip(pair["input"], pair["output"], strict=True)]
            seen = {cells for before, after in lines for cells in zip(before, after, strict=True)}
            assert len({old for old, _ in seen}) == len(seen)


@settings(max_examples=25)
@given(st.integers(0, 99), st.integers(1, 6), st.integers(2, 8), st.integers(1, 4))
def test_grids_have_the_sizes_and_colours_that_are_asked_for(seed: int, size: int, colors: int, pairs: int) -> None:
    found = puzzles(num_tasks=20, seed=seed, min_size=size, max_size=size + 2, num_colors=colors, num_pairs=pairs)
    for row in found:
        assert len(row["train"]) == pairs
        for pair in (*row["train"], *row["test"]):
            grid = pair["input"]
            assert size <= len(grid) <= size + 2
            assert size <= len(grid[0]) <= size + 2
            assert len({cell for line in grid for cell in line if cell}) <= colors
            assert all(0 <= cell <= 9 for line in pair["output"] for cell in line)


def test_too_many_tasks_of_a_size_are_an_error() -> None:
    with pytest.raises(InputError, match=r"finds only \d+ different tasks with grids up to 2"):
        list(rows(validate(GridPuzzlesSource, SECTION | {"min_size": 1, "max_size": 2, "num_pairs": 9}), max_tries=1))
    with pytest.raises(ConfigError, match="larger than max_size"):
        puzzles(min_size=5)
