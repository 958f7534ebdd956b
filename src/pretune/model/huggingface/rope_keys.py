"""Rotary positions in a config.json: rope_parameters (transformers 5), or rope_theta and rope_scaling (before it)."""

from __future__ import annotations

import math
from typing import Any

from pretune.core.config import InputError
from pretune.model.config import ModelConfig
from pretune.model.huggingface.keys import REQUIRED, Keys, NotHeld
from pretune.model.rope_config import DynamicScaling, LongropeScaling, NtkScaling

_SCALINGS: dict[str, dict[str, tuple[type, Any]]] = {
    "default": {},
    "linear": {"factor": (float, REQUIRED)},
    "dynamic": {"factor": (float, REQUIRED)},
    "yarn": {
        "factor": (float, REQUIRED),
        "attention_factor": (float, None),
        "beta_fast": (float, 32.0),
        "beta_slow": (float, 1.0),
        "mscale": (float, None),
        "mscale_all_dim": (float, None),
        "truncate": (bool, True),
    },
    "longrope": {"short_factor": (list, REQUIRED), "long_factor": (list, REQUIRED), "attention_factor": (float, None)},
    "llama3": {
        "factor": (float, REQUIRED),
        "low_freq_factor": (float, REQUIRED),
        "high_freq_factor": (float, REQUIRED),
    },
}
"""The types of rope that are known, and their keys, each with its type and the value that transformers gives it."""

_ORIGINAL = "original_max_position_embeddings"


def read_rope(keys: Keys, default_theta: float | None, length: int, phi3: bool = False) -> dict[str, Any]:
    """The section model.rope of a model with max_position_embeddings = `length`.

    `phi3`: whether it is a Phi-3, whose heads may be rotated in part, and which has other names for longrope. Raises
    InputError for positions that are stretched in a way that is not known, spellings that contradict each other, and a
    missing base without a default.
    """
    found = [keys.take(key, dict, default=None) for key in ("rope_parameters", "rope_scaling")]
    given = [Keys({"model_type": "rope", **one}, keys.path) for one in found if one]
    thetas = _values("rope_theta", [keys, *given])
    fractions = _values("partial_rotary_factor", [keys, *given])
    if max(len(thetas), len(fractions)) > 1 or (len(given) == 2 and _shape(given[0]) != _shape(given[1])):
        raise InputError(f"{keys.path}: rope_parameters, rope_scaling and rope_theta contradict each other; keep one")
    if not thetas and default_theta is None:
        raise InputError(f"{keys.path} has no rope_theta, neither on its own nor in rope_parameters")
    fraction = fractions.pop() if fractions else 1.0
    if fraction != 1 and not phi3:
        raise NotHeld(f"{keys.path}: partial_rotary_factor = {fraction} cannot be computed; 1.0 can")
    original = 4096 if phi3 else None
    if phi3 or (keys.content.get(_ORIGINAL) is not None and any(_kind(one, phi3) in _STRETCHED for one in given)):
        original = keys.take(_ORIGINAL, int, default=original)  # it comes before the one in rope_parameters
    scaling = None
    for one in given:
        one.take("model_type", str)
        scaling = _scaling(one, _kind(one, phi3), original, length)
        one.refuse_rest(())
    theta = thetas.pop() if thetas else default_theta
    return {"theta": theta, "local_theta": None, "fraction": fraction, "scaling": scaling, "pattern": "R"}


def take_local_theta(keys: Keys, default: float) -> float:
    """The base in layers with a window, for a Gemma 3; in rope_parameters only what holds in the other layers is left.

    Raises InputError for spellings that contradict each other, and windowed layers that are stretched.
    """
    thetas = _values("rope_local_base_freq", [keys])
    nested = keys.take("rope_parameters", dict, default=None)
    if nested:
        kinds = [nested.get(kind) or {} for kind in ("sliding_attention", "full_attention")]
        if set(nested) - {"sliding_attention", "full_attention"} or not all(isinstance(one, dict) for one in kinds):
            raise InputError(
                f"{keys.path}: rope_parameters must have sliding_attention and full_attention, and no more"
            )
        local = Keys({"model_type": "rope", **kinds[0]}, keys.path)
        local.take("model_type", str)
        local.must_be("rope_type", "default", default="default")
        thetas |= _values("rope_theta", [local])
        local.refuse_rest(())
        keys.content["rope_parameters"] = kinds[1]
    if len(thetas) > 1:
        raise InputError(f"{keys.path}: rope_parameters and rope_local_base_freq contradict each other; keep one")
    return thetas.pop() if thetas else default


_STRETCHED = ("yarn", "longrope", "llama3")
"""Types that have an original length of their own."""


def _values(key: str, places: list[Keys]) -> set[float]:
    """The different values of a key in these places."""
    return {value for one in places if (value := one.take(key, float, default=None)) is not None}


def _kind(given: Keys, phi3: bool) -> str:
    kind: str = given.take("type", str, default="default")
    kind = given.take("rope_type", str, default=kind)
    if phi3 and kind in ("su", "yarn"):  # what files older than the name longrope call it
        return "longrope"
    if kind not in _SCALINGS:
        raise NotHeld(f"{given.path}: the rope_type {kind} is not known; {', '.join(_SCALINGS)} are")
    return kind


def _scaling(given: Keys, kind: str, original: int | None, length: int) -> dict[str, Any] | None:
    """The section model.rope.scaling; `original` is what stands beside rope_parameters."""
    values = {key: given.take(key, number, default) for key, (number, default) in _SCALINGS[kind].items()}
    if kind == "default":
        return None
    if kind == "dynamic":
        values[_ORIGINAL] = length  # what transformers takes
    if kind in _STRETCHED:
        inside = given.take(_ORIGINAL, int, REQUIRED if kind == "llama3" and original is None else length)
        values[_ORIGINAL] = inside if original is None else original
    if kind == "yarn" and (values["attention_factor"] or not (values["mscale"] and values["mscale_all_dim"])):
        values |= {"mscale": None, "mscale_all_dim": None}  # they count only so
    if kind == "longrope":
        factor = given.take("factor", float, default=None)
        if values["attention_factor"] is None:
            values["attention_factor"] = _longrope_factor(factor, values[_ORIGINAL], length)
    return {"kind": kind, **values}


def _longrope_factor(stretch: float | None, original: int, length: int) -> float:
    """The attention factor of longrope where none is given, for positions stretched from `original` to `length`."""
    stretch = length / max(original, 1) if stretch is None else stretch
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 and original > 1 else 1.0


def max_length(scaling: dict[str, Any] | None, length: int) -> int:
    """model.max_sequence_length for max_position_embeddings = `length`: `length`, except where this is the original
    length, and the factor says how far it is stretched (dynamic, and Qwen2.5's yarn)."""
    if scaling is None or scaling["kind"] not in ("dynamic", "yarn") or length > scaling[_ORIGINAL]:
        return length
    return int(length * scaling["factor"])


def written_rope(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json for the positions of a model: what `read_rope` and transformers read."""
    rope, length = config.rope, config.max_sequence_length
    scaling: dict[str, Any] = {"rope_type": "default"}
    theta = rope.theta
    if isinstance(rope.scaling, NtkScaling):  # it is nothing but another theta
        theta = rope.scaling.raised(theta, rope.rotated(config.head_dim))
    elif rope.scaling is not None:
        values = {key: value for key, value in rope.scaling.model_dump(mode="json").items() if value is not None}
        scaling = {"rope_type": values.pop("kind"), **values}
    beside: dict[str, Any] = {"rope_theta": theta}  # where programs look that do not know rope_parameters
    if isinstance(rope.scaling, DynamicScaling):
        length = scaling.pop(_ORIGINAL)
    if _ORIGINAL in scaling:
        beside[_ORIGINAL] = scaling[_ORIGINAL]  # where transformers' Phi-3 and llama.cpp look
    if isinstance(rope.scaling, LongropeScaling):
        original = rope.scaling.original_max_position_embeddings
        if math.isclose(rope.scaling.attention_factor, _longrope_factor(None, original, length), rel_tol=1e-12):
            del scaling["attention_factor"]  # older versions of transformers refuse it
    if rope.scaling is not None and scaling["rope_type"] != "default":
        beside["rope_scaling"] = scaling  # the same
    fraction = {} if rope.fraction == 1 else {"partial_rotary_factor": rope.fraction}
    parameters = scaling | {"rope_theta": theta} | fraction
    if rope.local_theta is not None:
        local = {"rope_type": "default", "rope_theta": rope.local_theta}
        parameters = {"sliding_attention": local, "full_attention": parameters}
        beside["rope_local_base_freq"] = rope.local_theta
    return {"max_position_embeddings": length, "rope_parameters": parameters, **beside, **fraction}


def _shape(keys: Keys) -> dict[str, Any]:
    """What stretches positions, in either spelling."""
    left_out = ("rope_theta", "partial_rotary_factor")
    content = {key: value for key, value in keys.content.items() if key not in left_out and value is not None}
    return {"rope_type" if key == "type" else key: value for key, value in content.items()}
