"""What the configuration of every data format has in common."""

from __future__ import annotations

from typing import ClassVar

from pretune.core.config import Section

Names = tuple[str, ...]


class FormatBase(Section):
    """Base of all formats, with what can be measured on their rows."""

    has_pairs: ClassVar[bool] = False
    """Whether a row holds two answers to one prompt, the better one first."""
    has_answers: ClassVar[bool] = False
    """Whether generated answers can be checked."""
    has_tasks: ClassVar[bool] = False
    """Whether a row is a task of grids."""

    @property
    def content_columns(self) -> tuple[str, ...]:
        """The columns that tell rows apart: rows that are equal in all of them are on the same side of a split."""
        raise NotImplementedError

    @property
    def has_options(self) -> bool:
        """Whether a row has options whose likelihoods after the prompt can be compared."""
        return False

    @property
    def group(self) -> str:
        """The group of the metrics that are measured of its problems: `mathqa` in `mathqa/accuracy`."""
        raise NotImplementedError
