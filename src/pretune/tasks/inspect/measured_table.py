"""The table of what was measured of models on a run's data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pretune.core.units import memory, short
from pretune.memory.ways import Way
from pretune.tasks.inspect.measure import Measured
from pretune.tasks.inspect.memory import Needs
from pretune.tasks.inspect.table import WAY_NAMES, Column
from pretune.tracker.metrics import error_of, is_task_share, metric

BITS, ACCURACY, CHANCE = "val/bits_per_byte", "accuracy", "chance"


@dataclass(frozen=True)
class MeasuredRow:
    """A candidate that was measured, with its size and what it takes in memory on this machine."""

    measured: Measured
    parameters: int | None
    fits: tuple[str, ...]
    """The ways of training that fit this machine's memory."""


def fitting(needs: Needs | None, usable: int) -> tuple[str, ...]:
    """The ways of training that fit into `usable` bytes."""
    if needs is None:
        return ()
    training: tuple[Way, ...] = ("full", "LoRA", "QLoRA")
    return tuple(WAY_NAMES[way] for way in training if (size := needs.by_way[way]) is not None and size <= usable)


def accuracies(all_measured: Sequence[Measured]) -> list[str]:
    """The names of the accuracies that any of them has: `mathqa/accuracy`, `preference/accuracy`."""
    names = dict.fromkeys(name for one in all_measured for row in one.rows for name in row)
    shares = (name for name in names if is_task_share(name) or name == "preference/accuracy")
    return [name for name in shares if name.endswith(("/accuracy", "/generated_accuracy"))]


def measured_columns(rows: Sequence[MeasuredRow], seconds: float, where: str) -> list[Column]:
    """Every property, in the order of the table. where: the device whose memory is meant."""
    after = f"after {seconds:g} s"
    columns = [
        Column("model", lambda row: row.measured.name),
        Column("parameters", lambda row: row.parameters, short),
        Column("bits/byte, zero-shot", lambda row: row.measured.first(BITS), metric(BITS).text),
        Column(f"bits/byte, {after}", lambda row: row.measured.last(BITS), metric(BITS).text),
    ]
    for name in accuracies([row.measured for row in rows]):
        columns += [_share(f"{name}, zero-shot", name, Measured.first), _share(f"{name}, {after}", name, Measured.last)]
    chance = next((name for row in rows for line in row.measured.rows for name in line if _is_chance(name)), None)
    if chance is not None:
        columns.append(Column("guessing", lambda row: row.measured.last(chance), metric(chance).text))
    return [
        *columns,
        Column("tokens/s, training", _training_speed, "{:,.0f}".format),
        Column("tokens read", lambda row: row.measured.summary.get("tokens"), short),
        Column("steps", lambda row: row.measured.summary.get("step"), "{:,}".format),
        Column("tokens/s, generation", lambda row: row.measured.generation, "{:,.1f}".format),
        Column("peak memory", lambda row: row.measured.summary.get("peak_memory_bytes"), memory),
        Column(f"fits {where}", lambda row: ", ".join(row.fits) or "nothing"),
    ]


def _is_chance(name: str) -> bool:
    return is_task_share(name) and name.endswith(f"/{CHANCE}")


def _share(title: str, name: str, of: Callable[[Measured, str], Any]) -> Column:
    """A share with its standard error."""
    return Column(
        title, lambda row: of(row.measured, name), metric(name).text, lambda row: of(row.measured, error_of(name))
    )


def _training_speed(row: MeasuredRow) -> float | None:
    tokens, seconds = row.measured.summary.get("tokens"), row.measured.summary.get("seconds")
    return tokens / seconds if tokens and seconds else None
