"""A hash that spreads integers evenly over 64 bits, the same on every machine and for every version of a library."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

Integers = TypeVar("Integers", int, np.ndarray)

_MASK = 2**64 - 1


def mix(value: Integers) -> Integers:
    """The finalizer of SplitMix64 of an integer, or of each of an array of uint64, below 2**64."""
    # Arrays of uint64 wrap by themselves; for Python's integers the mask does it.
    value = value + 0x9E3779B97F4A7C15 & _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
