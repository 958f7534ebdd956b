"""Pictures of tasks of grids: each test's input, the output that is right, and the answers."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretune.core.config import InputError
from pretune.tasks.report.figure import INK, STYLE

MAX_TESTS = 12
"""Tests in one picture."""

COLORS = (
    "#000000", "#0074d9", "#ff4136", "#2ecc40", "#ffdc00", "#aaaaaa", "#f012be", "#ff851b", "#7fdbff", "#870c25",
)  # fmt: skip
"""The ten colours in which ARC's own page draws grids."""


def answered_tests(folder: Path) -> list[dict[str, Any]]:
    """The newest answers of a run to tests of grids; empty if there are none. InputError for a damaged file."""
    file = folder / "evaluations" / "arc.jsonl"
    try:
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    except ValueError as error:
        raise InputError(f"{file} is damaged ({error}); run task=evaluate again, or delete it") from None


def draw_tests(tests: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG with a row for each of the first tests: the input, the right output where it is known, the greedy answer,
    that with the most votes and, where the model was trained on each task, that of the trained model."""
    import matplotlib
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    rows = [_row(test) for test in tests[:MAX_TESTS]]
    width, colors = max(map(len, rows)), ListedColormap(COLORS)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.9 * width, 2.0 * len(rows)), dpi=110, layout="constrained")
        for line, panels in zip(rows, figure.subplots(len(rows), width, squeeze=False), strict=True):
            for number, axes in enumerate(panels):
                axes.set_axis_off()
                if number >= len(line):
                    continue
                title, grid = line[number]
                axes.set_title(title, fontsize=7)
                if grid is None:
                    axes.text(0.5, 0.5, "no grid", ha="center", va="center", color=INK, transform=axes.transAxes)
                    continue
                edge = {"edgecolors": "#888888", "linewidth": 0.4}
                axes.pcolormesh(grid, cmap=colors, vmin=-0.5, vmax=9.5, **edge)
                axes.set_aspect("equal")
                axes.invert_yaxis()
        picture = io.BytesIO()
        figure.savefig(picture, format="png", facecolor="white")
    return picture.getvalue()


def _row(test: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The titles and the grids of a test's panels."""
    found = [(f"{test['task']}, test {test['test']}", test["input"])]
    if test["wanted"] is not None:
        found.append(("expected", test["wanted"]))
    for name, answers in (("", test), ("trained ", test.get("trained"))):
        if answers is not None:
            found.append((f"{name}answer{_mark(answers['grid'], test['wanted'])}", answers["grid"]))
            voted = answers["votes"][0]["grid"] if answers["votes"] else None
            found.append((f"{name}vote{_mark(voted, test['wanted'])}", voted))
    return found


def _mark(grid: Any, wanted: Any) -> str:
    return "" if wanted is None else ": right" if grid == wanted else ": wrong"
