"""Runs that differ only in their seed, and their statistics."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pretune.core.files import fingerprint
from pretune.run.folder import free_keys

_SEED = re.compile(r"[-_.,+=]+(seed|s)?[-_.,+=]*\d*$")
"""What precedes the seed in the names of such runs."""


def same_but_for_the_seed(configs: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Indices of the configurations that are equal except for seed, name and keys that may differ on resume.

    In the order in which they first come. Two of a group have different seeds: a copy of a run, or its repetition, is
    no second seed, and begins a group of its own. A configuration that is empty, because it is unknown, equals no
    other.
    """
    groups: dict[tuple[str, int], list[int]] = {}
    repeated: Counter[tuple[str, Any]] = Counter()
    free = free_keys()
    for place, config in enumerate(configs):
        what = {key: value for key, value in config.items() if key != "seed" and key not in free}
        same = fingerprint(what) if what else str(place)
        groups.setdefault((same, repeated[same, config.get("seed")]), []).append(place)
        repeated[same, config.get("seed")] += 1
    return list(groups.values())


def common_name(names: Sequence[str]) -> str:
    """The common beginning of a group's names, and their number; the name of a single run."""
    if len(names) == 1:
        return names[0]
    letters = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    shared = _SEED.sub("", "".join(column[0] for column in letters)) or names[0]
    return f"{shared} ({len(names)} seeds)"


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter is 0 for a single value."""
    mean = statistics.fmean(values)
    if all(value == values[0] for value in values) or not all(map(math.isfinite, values)):
        return (values[0] if len(set(values)) == 1 else mean), 0.0
    return mean, statistics.stdev(values)
