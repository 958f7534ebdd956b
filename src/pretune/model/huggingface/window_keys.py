"""Sliding windows in a config.json: which layers have them, and how wide they are.

A window of n is, in transformers as here, the token itself and the n - 1 before it.
"""

from __future__ import annotations

from typing import Any

from pretune.core.config import InputError
from pretune.model.config import ModelConfig
from pretune.model.huggingface.families import Family
from pretune.model.huggingface.keys import Keys

_LETTERS = {"sliding_attention": "S", "full_attention": "L"}


def read_window(keys: Keys, family: Family, num_layers: int) -> dict[str, Any] | None:
    """The section model.window. Raises InputError for keys that contradict each other."""
    if family.windows == "none":
        return None
    if family.windows == "off":
        keys.must_be("use_sliding_window", False, default=False)
        keys.take("sliding_window", int, default=None)
        keys.take("max_window_layers", int, default=None)
        if set(map(str, keys.take("layer_types", list, default=[]))) - {"full_attention"}:
            raise InputError(f"{keys.path}: layer_types must be full_attention in every layer")
        return None
    size = keys.take("sliding_window", int, default=family.window, none=True)
    if family.windows == "every":
        return None if size is None else {"size": size, "pattern": "S", "full_last_layer": False}
    types = keys.take("layer_types", list, default=None)
    if family.windows == "typed":
        used, full = size is not None, _full_by_period(keys, family, num_layers)
    else:
        used = keys.take("use_sliding_window", bool, default=False) and size is not None
        first = keys.take("max_window_layers", int, default=28)
        full = [not used or layer < first for layer in range(num_layers)]
    if types is None:
        types = ["full_attention" if whole else "sliding_attention" for whole in full]
    if len(types) != num_layers or any(str(one) not in _LETTERS for one in types):
        raise InputError(f"{keys.path}: layer_types must be {num_layers} times full_attention or sliding_attention")
    if "sliding_attention" in types and not used:
        raise InputError(f"{keys.path}: layer_types has sliding_attention, but use_sliding_window or sliding_window no")
    pattern = "".join(_LETTERS[one] for one in types)
    return {"size": size, "pattern": pattern, "full_last_layer": False} if "S" in pattern else None


def _full_by_period(keys: Keys, family: Family, num_layers: int) -> list[bool]:
    """Which layers have no window if layer_types is left out."""
    period = family.period
    if family.local_theta is not None:  # Gemma 3, of which older files have this key
        period = keys.take("sliding_window_pattern", int, default=period)
    if period < 1:
        raise InputError(f"{keys.path}: sliding_window_pattern = {period} must be at least 1")
    return [layer % period == 0 for layer in range(1, num_layers + 1)]


def written_window(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The keys of config.json for the windows of a model that fits the family."""
    windows = [config.window_of(layer) for layer in range(config.num_layers)]
    size = next((window for window in windows if window is not None), None)
    if family.windows in ("none", "off"):
        return {}
    if family.windows == "every":
        return {"sliding_window": size}
    types = ["full_attention" if window is None else "sliding_attention" for window in windows]
    if family.windows == "typed":
        return {"sliding_window": family.window if size is None else size, "layer_types": types}
    full = windows.index(size) if size is not None else config.num_layers
    return {
        "use_sliding_window": size is not None,
        "sliding_window": size,
        "layer_types": types,
        "max_window_layers": full,  # where programs look that do not know layer_types; wrong for other patterns
    }
