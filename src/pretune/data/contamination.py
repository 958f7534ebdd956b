"""Contamination: held-out documents that are in the training data too; and repeated ones. Both are found by content."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product

import numpy as np

from pretune.core.config import ConfigError
from pretune.data.config import DataConfig
from pretune.data.hashing import mix
from pretune.data.tokens import TokenData

TOO_MANY = 0.25
"""Share of held-out documents in the training data from which on a validation loss says little of anything else."""


def contamination(sets: Mapping[str, tuple[DataConfig, TokenData, TokenData]]) -> Iterator[str]:
    """A line for each set whose training documents repeat each other, and for each pair of sets in which a few held-out
    documents are training documents too.

    Both are common in real data, and a published validation set must stay what it is: they are reported and kept.
    `sets`: section, training and held-out side of each set, by its name in the configuration. Raises ConfigError if
    too many of a set's held-out documents are trained on.
    """
    for name, (config, train, _) in sets.items():
        hashes = content_hashes(train, config.format.has_pairs)
        if repeated := len(hashes) - len(np.unique(hashes)):
            whose = "" if name == "data" else f" ({name})"
            yield f"{repeated:,} of {len(hashes):,} training {_unit(config)} repeat another{whose}"
    for (trained, (train, seen, _)), (measured, (other, _, held_out)) in product(sets.items(), repeat=2):
        wanted = content_hashes(held_out, other.format.has_pairs)
        count = num_contained(wanted, content_hashes(seen, train.format.has_pairs))
        unit = _unit(other)
        if count >= TOO_MANY * len(wanted):
            raise ConfigError(
                f"{count:,} of the {len(wanted):,} held-out {unit} of {measured} are in the training data of {trained} "
                f"too: the model would be measured on what it was trained on; {_remedy(measured, other)}"
            )
        if count:
            whose = "" if measured == trained == "data" else f" ({measured} in {trained})"
            yield f"{count:,} of {len(wanted):,} held-out {unit} are in the training data too{whose}"


def _unit(config: DataConfig) -> str:
    return "pairs" if config.format.has_pairs else "documents"


def _remedy(name: str, config: DataConfig) -> str:
    if config.validation.source is None:
        return f"set {name}.validation.group_by to a column that is equal in such rows"
    return f"take them out of one of the two sources, or hold out a part of the source: {name}.validation.fraction"


def content_hashes(data: TokenData, pairs: bool) -> np.ndarray:
    """A hash of each document, or of each preference pair, which is two documents: [N] uint64."""
    hashes = data.document_hashes
    return mix(hashes[0::2]) ^ hashes[1::2] if pairs else hashes


def num_contained(wanted: np.ndarray, present: np.ndarray) -> int:
    """How many of the hashes `wanted` [N] are among those `present` [M]."""
    known = np.unique(wanted)
    places = np.searchsorted(known, present).clip(max=len(known) - 1)
    return int(np.isin(wanted, present[known[places] == present]).sum())
