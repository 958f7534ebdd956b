"""Configuration of grids as text, and of the variants that are made of a task of grids."""

from __future__ import annotations

from typing import Literal

from pretune.core.config import Count, Section


class GridConfig(Section):
    separator: Literal["", " ", ","]
    """What stands between the digits of a row. A tokenizer that merges digits needs one."""
    row_numbers: bool
    """Begin each row with its number and a space."""
    shape: bool
    """Say before the rows how many there are, and how many columns: `shape: 3x4`."""
    fence: bool
    """Put the grid between lines of three backquotes, the first of them with the word grid."""


class AugmentConfig(Section):
    """Variants of a task: a rotation or reflection, a permutation of its colours and an order of its pairs, drawn
    anew for each and the same in all its grids."""

    variants: Count
    """Number of variants; the first is the task as it stands, so that 1 makes no others."""
    dihedral: bool
    """Rotate and reflect the grids: one of eight ways."""
    colors: Literal["none", "all_but_0", "all"]
    """Which colours are permuted; 0 is most often the background."""
    pair_order: bool
    """Shuffle the pairs before the test."""
    seed: int
    """Random seed: the same seed gives the same variants of a task."""
