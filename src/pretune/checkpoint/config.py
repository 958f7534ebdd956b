"""When a run is saved, and which checkpoint is used."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pretune.core.config import Count, Every, Section


class CheckpointConfig(Section):
    every: Every
    """Steps between checkpoints; null saves only at the end (and when a signal stops the run)."""
    keep: Count | None
    """How many to keep, newest first; null keeps all."""
    keep_best: bool
    """Save at every evaluation that is the best so far (the lowest val/loss), and keep the best beside the newest."""
    use: Literal["best", "newest"] | Annotated[int, Field(ge=0)]
    """Which one is evaluated, generated with and started from (stage.init_from): `best` is the best where the run
    keeps it (keep_best), else the newest; a number is a step. Training always goes on from the newest."""
