"""The trade-off between models in one figure: quality over seconds of training, and over the speed of generation."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from pretune.tasks.inspect.measure import Measured
from pretune.tasks.inspect.measured_table import BITS, accuracies
from pretune.tasks.report.figure import COLORS, INK, STYLE
from pretune.tracker.metrics import metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Colored = Sequence[tuple[Measured, str]]


def draw_tradeoff(all_measured: Sequence[Measured]) -> bytes:
    """A PNG: for bits per byte and for each accuracy, a panel of its values over seconds of training, and one of the
    last value over the tokens per second that the model generates, with a line through the models that no other beats
    in both."""
    import matplotlib
    from matplotlib.figure import Figure

    colored = [(one, COLORS[place % len(COLORS)]) for place, one in enumerate(all_measured)]
    panels: list[tuple[str, str, Callable[[Axes], None]]] = []
    for name in (BITS, *accuracies(all_measured)):
        if any(one.last(name) is not None for one in all_measured):
            label = "bits per byte" if name == BITS else name
            panels.append((f"{label} over training", "seconds", partial(_over_seconds, colored=colored, name=name)))
            title = f"{label} against speed"
            panels.append((title, "tokens/s, generation", partial(_against_speed, colored=colored, name=name)))
    with matplotlib.rc_context(STYLE):
        rows = len(panels) // 2
        figure = Figure(figsize=(9.6, 3.9 * rows), dpi=150, layout="constrained")
        for axes, (title, label, fill) in zip(figure.subplots(rows, 2, squeeze=False).flat, panels, strict=True):
            fill(axes)
            axes.set_title(title, loc="left", fontweight="bold")
            axes.set_xlabel(label)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", facecolor="white")
    return picture.getvalue()


def _over_seconds(axes: Axes, colored: Colored, name: str) -> None:
    for one, color in colored:
        x, y = one.over_time(name)
        axes.plot(x, y, color=color, linewidth=1.8, marker="o", markersize=3.5, label=one.name)
    axes.set_xlim(left=0)
    _in_its_unit(axes, name)
    axes.legend(loc="best", fontsize=8)


def _against_speed(axes: Axes, colored: Colored, name: str) -> None:
    points = [
        (one.generation, float(last), one.name, color) for one, color in colored if (last := one.last(name)) is not None
    ]
    higher = metric(name).better == "higher"
    front = unbeaten([(speed, quality if higher else -quality) for speed, quality, _, _ in points])
    line = sorted(points[place][:2] for place in front)
    axes.plot([x for x, _ in line], [y for _, y in line], color=INK, linewidth=1, linestyle=":", zorder=1)
    for speed, quality, label, color in points:
        axes.scatter(speed, quality, color=color, s=36, zorder=2)
        axes.annotate(label, (speed, quality), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8)
    axes.margins(x=0.25, y=0.2)
    _in_its_unit(axes, name)


def unbeaten(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places of the points that no other is at least as good as in both values (more is better) and better in
    one."""
    return [
        place
        for place, (x, y) in enumerate(points)
        if not any(u >= x and v >= y and (u, v) != (x, y) for u, v in points)
    ]


def _in_its_unit(axes: Axes, name: str) -> None:
    from matplotlib.ticker import PercentFormatter

    if name != BITS:
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
