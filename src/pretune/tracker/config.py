"""Where a run's metrics go besides its own folder, as YAML says it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pretune.core.config import Section


class WandbConfig(Section):
    kind: Literal["wandb"]
    """Weights & Biases; offline, into the run's folder, where there is no key or no network."""
    project: str
    """Project that the run appears in."""
    entity: str | None
    """Team or user that owns the project; null is the user's default."""
    group: str | None
    """Runs of one group are compared together; null uses the run's name."""
    mode: Literal["auto", "online", "offline"]
    """auto goes online when there is a key and the server answers."""
    tags: tuple[str, ...]
    """Free labels."""


class NoTrackerConfig(Section):
    kind: Literal["none"]
    """Only the run's folder and the console."""


TrackerConfig = Annotated[WandbConfig | NoTrackerConfig, Field(discriminator="kind")]
