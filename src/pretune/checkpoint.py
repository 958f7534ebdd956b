"""Checkpoints: safetensors and JSON in folders that are whole or absent."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pretune.config import Every, Section


class CheckpointConfig(Section):
    every: Every
    """Steps between checkpoints; null saves only at the end (and when a signal stops the run)."""
    keep: Annotated[int, Field(ge=1)] | None
    """How many to keep, newest first; null keeps all."""
