"""Whether runs have learned anything, for `report.verify`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

FALLEN = 0.8
"""The validation loss must fall to this fraction of its initial value."""
ABOVE_CHANCE = 2.0
"""The final accuracy must be this multiple of chance."""


def verdict(name: str, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether a run has learned, and a line that says so. rows: its metrics; summary: empty until it is complete."""
    losses = [row["val/loss"] for row in rows if row.get("val/loss") is not None]
    if not summary or len(losses) < 2:
        return False, f"{name} is not complete, or was evaluated only once: run it to its end first"
    task = next((name.rpartition("/")[0] for name in summary if name.endswith("/chance")), None)
    accuracy, chance = summary.get(f"{task}/accuracy"), summary.get(f"{task}/chance")
    said = f"validation loss {losses[0]:.2f} -> {losses[-1]:.2f}"
    learned = losses[-1] <= FALLEN * losses[0]
    if accuracy is not None and chance is not None:
        said += f", {accuracy:.1%} of the problems right (guessing: {chance:.0%})"
        learned = learned and accuracy >= ABOVE_CHANCE * chance
    if learned:
        return True, f"{name} has learned: {said}"
    steps, seconds = summary.get("step", 0), summary.get("seconds", 0.0)
    speed = f"{steps:,} steps in {seconds:,.0f} s ({summary.get('train/tokens_per_second') or 0:,.0f} tokens/s)"
    return False, (
        f"{name} has learned too little: {said}. It made {speed}: if that is slow, see the first lines of the run "
        "(precision, other processes), or increase budget.time"
    )
