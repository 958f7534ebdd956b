"""Configuration of where metrics go besides the run's folder."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pretune.core.config import Section


class WandbConfig(Section):
    kind: Literal["wandb"]
    """Weights & Biases; offline, into the run's folder, if there is no API key or no network."""
    project: str
    """The wandb project."""
    entity: str | None
    """Team or user that owns the project; null is the user's default."""
    group: str | None
    """Group in which wandb compares runs; null uses the run's name."""
    mode: Literal["auto", "online", "offline"]
    """auto is online if there is an API key and the server answers."""
    tags: tuple[str, ...]
    """Free labels."""


class NoTrackerConfig(Section):
    kind: Literal["none"]
    """Only the run's folder and the console."""


TrackerConfig = Annotated[WandbConfig | NoTrackerConfig, Field(discriminator="kind")]
