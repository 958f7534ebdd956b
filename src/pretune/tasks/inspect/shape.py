"""The size and the form of a model, whoever can build it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretune.data.tokenizer_files import read_keys
from pretune.model.costs import parameters_by_part, skeleton
from pretune.model.section import AnyModelConfig
from pretune.model.transformers_model.config import TransformersConfig

_TABLES = ("embedding", "value embedding", "position embedding", "head")


@dataclass(frozen=True)
class Shape:
    """What a model's configuration says; None for what it has not."""

    architecture: str | None
    """transformers' model_type."""
    parameters: int | None
    """All parameters, tied ones once; None if they cannot be counted."""
    without_embeddings: int | None
    """Those outside the embedding tables and the head."""
    layers: int | None
    dim: int | None
    vocabulary: int | None
    context: int | None
    """Number of positions; None without a limit."""
    theta: float | None
    """Base of the rotary positions."""
    local_theta: float | None
    """That of layers with a window, where they have one of their own."""
    scaling: str | None
    """How positions are stretched: `llama3 x 32`."""
    heads: int | None
    kv_heads: int | None

    @property
    def tensor_parallel(self) -> tuple[int, ...]:
        """The numbers of devices among which heads and key and value heads can be divided evenly."""
        if self.heads is None or self.kv_heads is None:
            return ()
        common = math.gcd(self.heads, self.kv_heads)
        return tuple(size for size in range(1, common + 1) if common % size == 0)


def shape_of(model: AnyModelConfig) -> Shape:
    """The shape of a model that Pretune's transformer or transformers builds."""
    parts = parameters_by_part(skeleton(model))
    if isinstance(model, TransformersConfig):
        return _shape_in(model.library, sum(parts.values()), sum(parts.get(table, 0) for table in _TABLES))
    rope, scaling = model.rope, model.rope.scaling
    rotated = rope.fraction > 0
    return Shape(
        architecture=model.architecture,
        parameters=sum(parts.values()),
        without_embeddings=sum(count for part, count in parts.items() if part not in _TABLES),
        layers=model.num_layers,
        dim=model.dim,
        vocabulary=model.vocab_size,
        context=model.max_sequence_length,
        theta=rope.theta if rotated else None,
        local_theta=rope.local_theta if rotated else None,
        scaling=None if scaling is None else _stretched(scaling.kind, getattr(scaling, "factor", None)),
        heads=model.num_heads,
        kv_heads=model.num_kv_heads,
    )


def shape_in_file(folder: Path) -> Shape:
    """What the config.json in `folder` says by itself, of a model that nothing here builds."""
    return _shape_in(_Plain(read_keys(folder / "config.json")), None, 0)


class _Plain:
    """The keys of a config.json as attributes, as a configuration of transformers has them."""

    def __init__(self, keys: dict[str, Any]) -> None:
        vars(self).update(keys)

    def get_text_config(self) -> Any:
        inner = vars(self).get("text_config")
        return _Plain(inner) if isinstance(inner, dict) else self


def _shape_in(config: Any, parameters: int | None, tables: int) -> Shape:
    text = config.get_text_config()
    heads = _number(text, "num_attention_heads")
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    whole, local = (rope.get(kind, rope) for kind in ("full_attention", "sliding_attention"))
    theta = whole.get("rope_theta", getattr(text, "rope_theta", None))
    local_theta = local.get("rope_theta", theta)
    kind = whole.get("rope_type", whole.get("type"))
    return Shape(
        architecture=getattr(config, "model_type", None),
        parameters=parameters,
        without_embeddings=None if parameters is None else parameters - tables,
        layers=_number(text, "num_hidden_layers"),
        dim=_number(text, "hidden_size"),
        vocabulary=_number(text, "vocab_size"),
        context=_number(text, "max_position_embeddings"),
        theta=theta,
        local_theta=None if local_theta == theta else local_theta,
        scaling=None if kind in (None, "default") else _stretched(kind, whole.get("factor")),
        heads=heads,
        kv_heads=_number(text, "num_key_value_heads") or heads,
    )


def _number(config: Any, key: str) -> int | None:
    found = getattr(config, key, None)
    return found if isinstance(found, int) else None


def _stretched(kind: str, factor: float | None) -> str:
    return kind if factor is None else f"{kind} x {factor:g}"
