"""The curves of runs in one figure: a panel for the losses of each stage and one for the accuracy on its task."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pretune.tracker.metrics import metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#64748b")
INK, _GRID = "#334155", "#e2e8f0"
STYLE: dict[Any, Any] = {
    "axes.edgecolor": _GRID,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "font.size": 9.0,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Curves:
    """One run's metrics, with its name, stage and group."""

    name: str
    stage: str
    rows: Sequence[dict[str, Any]]
    group: str
    """Runs of a group share a color and a legend entry."""

    def of(self, metric: str) -> tuple[list[float], list[float]]:
        """Tokens read and the value, wherever the metric was measured."""
        points = [(row.get("tokens", row["step"]), row[metric]) for row in self.rows if row.get(metric) is not None]
        return [x for x, _ in points], [y for _, y in points]

    def tasks(self) -> list[str]:
        """The tasks (`mathqa`...) whose accuracy was measured."""
        names = dict.fromkeys(name for row in self.rows for name in row if name.endswith("/accuracy"))
        return [name.partition("/")[0] for name in names]


def draw(runs: Sequence[Curves]) -> bytes:
    """A PNG of the runs, with their stages side by side in the given order."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import EngFormatter

    panels = _panels(runs)
    with matplotlib.rc_context(STYLE):
        # A figure of its own, not pyplot's: no global state, no display.
        figure = Figure(
            figsize=(max(6.4, 4.8 * len(panels)), 3.9), dpi=150, layout=ConstrainedLayoutEngine(wspace=0.06)
        )
        for axes, (title, label, fill) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            fill(axes)
            axes.set_title(title, loc="left", fontweight="bold")
            axes.set_xlabel("training tokens")
            axes.set_ylabel(label)
            axes.set_xlim(left=0)
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            if axes.get_legend_handles_labels()[0]:
                axes.legend(loc="best", fontsize=8)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", facecolor="white")
    return picture.getvalue()


def _panels(runs: Sequence[Curves]) -> list[tuple[str, str, Callable[[Axes], None]]]:
    """Title, label of the y axis and plotting function of each panel."""
    panels: list[tuple[str, str, Callable[[Axes], None]]] = []
    groups = list(dict.fromkeys(run.group for run in runs))
    colors = {group: COLORS[index % len(COLORS)] for index, group in enumerate(groups)}
    for stage in dict.fromkeys(run.stage for run in runs):
        group = [(run, colors[run.group]) for run in runs if run.stage == stage]
        pairs = any("preference/accuracy" in row for run, _ in group for row in run.rows)
        unit = "nats per pair" if pairs else metric("val/loss").unit
        panels.append((f"{stage}: loss", unit, partial(draw_losses, group=group)))
        for task in dict.fromkeys(task for run, _ in group for task in run.tasks()):
            panels.append((f"{stage}: {task} accuracy", "accuracy", partial(_accuracy, group=group, task=task)))
    return panels


def draw_losses(axes: Axes, group: Sequence[tuple[Curves, str]]) -> None:
    """Draw training and validation losses of runs of one stage, each with its color."""
    heights: list[float] = []
    for run, color in group:
        prefix, first = _legend(run, group)
        x, y = run.of("train/loss")
        if x:
            label = f"{prefix}training" if first else None
            axes.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
            point = "o" if len(x) == 1 else None  # a single report makes no line
            axes.plot(x, _smooth(y), color=color, alpha=0.7, linewidth=1.2, marker=point, markersize=3.5, label=label)
            heights += _smooth(y)
        x, y = run.of("val/loss")
        if x:
            label = f"{prefix}validation: {_final(run, group, 'val/loss')}" if first else None
            axes.plot(x, y, color=color, linewidth=1.8, marker="o", markersize=3.5, label=label)
            heights += y
    if heights:
        # The first steps start at ln(vocabulary) and would squeeze everything after them.
        low, high = min(heights), sorted(heights)[math.ceil(0.98 * (len(heights) - 1))]
        margin = max(0.06 * (high - low), 1e-3)
        axes.set_ylim(low - margin, high + margin)


def _accuracy(axes: Axes, group: Sequence[tuple[Curves, str]], task: str) -> None:
    from matplotlib.ticker import PercentFormatter

    highest = 0.0
    for run, color in group:
        prefix, first = _legend(run, group)
        x, y = run.of(f"{task}/accuracy")
        if y:
            label = f"{prefix}accuracy: {_final(run, group, f'{task}/accuracy')}" if first else None
            axes.plot(x, y, color=color, linewidth=1.8, marker="o", markersize=3.5, label=label)
            highest = max(highest, *y)
    chances = [run.of(f"{task}/chance")[1] for run, _ in group]
    if chance := next((values[-1] for values in chances if values), None):
        axes.axhline(chance, color=INK, linewidth=1, linestyle=":", label=f"chance: {chance:.1%}")
        highest = max(highest, chance)
    axes.set_ylim(0, 1.15 * highest or 1)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))


def _legend(run: Curves, group: Sequence[tuple[Curves, str]]) -> tuple[str, bool]:
    """The prefix of a run's legend entries, and whether it is the run of its group that has them."""
    names = [other.group for other, _ in group]
    first = next(other for other, _ in group if other.group == run.group)
    return ("" if len(set(names)) == 1 else f"{run.group}, "), first is run


def _final(run: Curves, group: Sequence[tuple[Curves, str]], name: str) -> str:
    """The newest value of a metric, averaged over the run's group."""
    series = [other.of(name)[1] for other, _ in group if other.group == run.group]
    return metric(name).text(fmean(values[-1] for values in series if values))


def _smooth(values: Sequence[float]) -> list[float]:
    """A bias-corrected running mean over about a fortieth of the curve."""
    keep = 1 - 1 / max(1.0, len(values) / 40)
    smoothed, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(mean / weight)
    return smoothed
