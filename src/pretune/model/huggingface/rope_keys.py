"""Rotary positions in a config.json: rope_parameters (transformers 5), or rope_theta and rope_scaling (before it)."""

from __future__ import annotations

from typing import Any

from pretune.core.config import InputError
from pretune.model.huggingface.keys import Keys

_SCALINGS: dict[str, dict[str, type]] = {
    "default": {},
    "linear": {"factor": float},
    "llama3": {
        "factor": float,
        "low_freq_factor": float,
        "high_freq_factor": float,
        "original_max_position_embeddings": int,
    },
}
"""The types of rope that are known, and their keys, all of which must be given: they have no defaults."""


def read_rope(keys: Keys, default_theta: float | None) -> dict[str, Any]:
    """The section model.rope. Raises InputError for positions that are stretched in a way that is not known, spellings
    that contradict each other, and a missing base without a default."""
    found = [keys.take(key, dict, default=None) for key in ("rope_parameters", "rope_scaling")]
    given = [Keys({"model_type": "rope", **one}, keys.path) for one in found if one]
    theta = keys.take("rope_theta", float, default=None)
    thetas = {one for one in (theta, *(one.take("rope_theta", float, default=None) for one in given)) if one}
    if len(thetas) > 1 or (len(given) == 2 and _shape(given[0]) != _shape(given[1])):
        raise InputError(f"{keys.path}: rope_parameters, rope_scaling and rope_theta contradict each other; keep one")
    if not thetas and default_theta is None:
        raise InputError(f"{keys.path} has no rope_theta, neither on its own nor in rope_parameters")
    keys.must_be("partial_rotary_factor", 1.0, default=1.0)
    scaling = None
    for one in given:
        one.must_be("partial_rotary_factor", 1.0, default=1.0)
        one.take("model_type", str)
        kind = one.take("type", str, default="default")
        kind = one.take("rope_type", str, default=kind)
        if kind not in _SCALINGS:
            raise InputError(f"{keys.path}: the rope_type {kind} is not known; {', '.join(_SCALINGS)} are")
        if kind != "default":
            scaling = {"kind": kind, **{key: one.take(key, number) for key, number in _SCALINGS[kind].items()}}
        one.refuse_rest(())
    return {"theta": thetas.pop() if thetas else default_theta, "fraction": 1.0, "scaling": scaling, "pattern": "R"}


def _shape(keys: Keys) -> dict[str, Any]:
    """What stretches positions, in either spelling."""
    content = {key: value for key, value in keys.content.items() if key != "rope_theta" and value is not None}
    return {"rope_type" if key == "type" else key: value for key, value in content.items()}
