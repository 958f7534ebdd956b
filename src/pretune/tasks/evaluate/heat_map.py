"""A heat map of right answers by the length of a text and by where in it the answer lies."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class HeatMap:
    """The share of right answers of each (length in tokens, depth as a share of the text), and the length of the texts
    that the model was trained on."""

    task: str
    lengths: Sequence[int]
    depths: Sequence[float]
    shares: Mapping[tuple[int, float], float]
    trained: int

    def as_json(self) -> dict[str, Any]:
        cells = [{"length": at[0], "depth": at[1], "accuracy": share} for at, share in self.shares.items()]
        return {"task": self.task, "trained_length": self.trained, "cells": cells}


def draw(maps: Sequence[tuple[str, HeatMap]]) -> bytes:
    """A PNG of heat maps side by side, each with its title: depth downwards, length to the right, and a line between
    the lengths that were trained and those beyond."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9.0}):
        width = max(3.2, 0.62 * max(len(one.lengths) for _, one in maps) + 1.6)
        figure = Figure(figsize=(width * len(maps) + 0.8, 3.6), dpi=150, layout="constrained")
        every = figure.subplots(1, len(maps), squeeze=False)[0]
        for axes, (title, one) in zip(every, maps, strict=True):
            _fill(axes, one)
            axes.set_title(title, loc="left", fontweight="bold")
        label = f"right answers ({maps[0][1].task})"
        figure.colorbar(every[0].images[0], ax=every, label=label, format="{x:.0%}", shrink=0.9)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", facecolor="white")
    return picture.getvalue()


def _fill(axes: Axes, one: HeatMap) -> None:
    lengths, depths = sorted(set(one.lengths)), sorted(set(one.depths))
    values = [[one.shares[length, depth] for length in lengths] for depth in depths]
    axes.imshow(values, cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            ink = "white" if value < 0.6 else "black"
            axes.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=8, color=ink)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("depth of the answer")
    within = sum(length <= one.trained for length in lengths)
    if 0 < within < len(lengths):
        axes.axvline(within - 0.5, color="#dc2626", linewidth=2)
        axes.annotate(
            f"trained up to {one.trained:,}", (within - 0.5, 1.0), (3, 3), ("data", "axes fraction"), "offset points",
            fontsize=7, ha="left", va="bottom",
        )  # fmt: skip
