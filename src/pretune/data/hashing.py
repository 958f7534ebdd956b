"""A hash from integers to uniform 64-bit integers that is the same on every machine and with every library version."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

Integers = TypeVar("Integers", int, np.ndarray)

_MASK = 2**64 - 1


def mix(value: Integers) -> Integers:
    """The SplitMix64 finalizer of an integer, or of each element of a uint64 array; below 2**64."""
    # uint64 arrays wrap around by themselves; Python integers need the mask.
    value = value + 0x9E3779B97F4A7C15 & _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
