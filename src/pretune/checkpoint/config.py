"""Configuration of checkpoints: when to save them and which one to use."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pretune.core.config import Count, Every, Section


class CheckpointConfig(Section):
    every: Every
    """Steps between checkpoints; null saves only at the end (and when a signal stops the run)."""
    keep: Count | None
    """How many of the newest checkpoints to keep; null keeps all."""
    keep_best: bool
    """Save a checkpoint at every evaluation that is the best so far (the lowest val/loss), and keep the best one
    too."""
    use: Literal["best", "newest"] | Annotated[int, Field(ge=0)]
    """The checkpoint used for evaluation, generation and stage.init_from: `best` is the best if the run keeps it
    (keep_best), else the newest; a number is a step. Training always resumes from the newest."""
