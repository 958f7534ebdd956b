"""Convert our adapters to peft's format for the same model in transformers.

transformers has separate layers for queries, keys and values (and for gate and up) that we stack into one. A low-rank
update of the stacked layer splits into one update per layer: each has its own rows of the second factor and shares the
first factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pretune.adapters.files import PREFIX, read_adapter
from pretune.adapters.quiet_peft import get_pattern_key
from pretune.adapters.vocabulary import ROWS, TABLES
from pretune.core.config import ConfigError

Layers = Mapping[str, Sequence[tuple[str, int]]]
"""For each of our linear layers, by name: the transformers layers that it stacks, with their rows, in order."""

_BESIDE = ("weight", "token_adapter.")
"""Tensors of what is trained beside the adapter: all of a table, or rows of it."""
_TYING, _HEAD = "ensure_weight_tying", "lm_head"
"""peft's key, of LoRA alone, for adapters on a tied embedding and head; and transformers' name of the head."""

BY_ROWS = ("lora_B.", "lora_magnitude_vector", "hada_w1_a", "hada_w2_a", "weight")
"""Adapter tensors with one row per row of the layer's weight; stacked layers share all other tensors. (On an embedding,
lora_embedding_A has a column per row, and nothing is stacked.)"""


def adapter_for_huggingface(folder: Path, layers: Layers, transposed: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration for peft's two files, from the adapter in `folder`; `transposed`: whether transformers
    stores the layers' matrices transposed (GPT-2), which peft adapts by LoRA and DoRA alone.

    Raises ConfigError for an adapter that has no counterpart in transformers.
    """
    stored, config = read_adapter(folder)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith("pissa"):
        raise ConfigError(
            f"adapter.init = {start} has moved part of the weights into the adapter, which does not fit the original "
            "weights; use export.adapter=merge"
        )
    if transposed and "fan_in_fan_out" not in config:
        raise ConfigError(
            f"peft has no {config.get('peft_type')} for GPT-2's layers, which are transposed: use export.adapter=merge"
        )
    tensors: dict[str, Tensor] = {}
    adapted: set[str] = set()
    for name, tensor in stored.items():
        ours = next(one for one in layers if name.startswith(f"{PREFIX}{one}."))
        part = name.removeprefix(f"{PREFIX}{ours}.")
        if not part.startswith(_BESIDE):
            adapted.add(ours)
        tensors.update(_split(tensor, ours, part, layers[ours]))
    targets = {theirs for ours in adapted for theirs, _ in layers[ours]}
    # `revision` is a fingerprint of the weights under our names.
    changes = {"target_modules": sorted(targets), "task_type": "CAUSAL_LM", "revision": None}
    changes |= _vocabulary(config, adapted, layers, targets)
    if changes.get(_TYING):
        tensors |= _of_tied_head(tensors, f"{PREFIX}{layers['embedding'][0][0]}.")
    if transposed:
        changes["fan_in_fan_out"] = True
    for key in ("rank_pattern", "alpha_pattern"):
        changes[key] = _spread(config.get(key) or {}, {ours: layers[ours] for ours in sorted(adapted)})
    return tensors, {**config, **changes, "inference_mode": True}


def _vocabulary(config: Mapping[str, Any], adapted: set[str], layers: Layers, targets: set[str]) -> dict[str, Any]:
    """What changes in the configuration for the embedding and the head; `adapted`: our layers that have an adapter.

    In a tied model, both are named, and peft is told to keep them one matrix.
    """
    rows, tables = config.get(ROWS) or {}, config.get(TABLES) or []
    changes: dict[str, Any] = {}
    if rows:
        changes[ROWS] = {layers[ours][0][0]: ids for ours, ids in rows.items()}
    if tables:
        changes[TABLES] = [layers[ours][0][0] for ours in tables]
    tied = "head" not in layers and ("embedding" in adapted or bool(tables))
    if (rows or tied) and _TYING not in config:
        raise ConfigError(
            f"peft has no {config.get('peft_type')} with new rows, or on a matrix that is embedding and head in one: "
            "use export.adapter=merge"
        )
    if tied:
        changes[_TYING] = True
        changes |= {TABLES: [*changes[TABLES], _HEAD]} if tables else {"target_modules": sorted({*targets, _HEAD})}
    return changes


def _of_tied_head(tensors: Mapping[str, Tensor], embedding: str) -> dict[str, Tensor]:
    """What peft asks for by the name of a tied head: the tensors of the `embedding` again, whose factors are those of a
    linear layer exchanged and transposed."""
    own = {name.removeprefix(embedding): one for name, one in tensors.items() if name.startswith(embedding)}
    if "weight" in own:
        return {f"{PREFIX}{_HEAD}.weight": own["weight"].clone()}
    factors = {"lora_A": own["lora_embedding_B"], "lora_B": own["lora_embedding_A"]}
    return {f"{PREFIX}{_HEAD}.{name}.weight": one.T.contiguous() for name, one in factors.items()}


def _spread(pattern: Mapping[str, float], layers: Layers) -> dict[str, float]:
    """A pattern for our layers, as one for theirs."""
    values = {ours: pattern.get(get_pattern_key(list(pattern), ours)) for ours in layers}
    return {theirs: value for ours, value in values.items() if value is not None for theirs, _ in layers[ours]}


def _split(tensor: Tensor, ours: str, part: str, layers: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
    if len(layers) > 1 and part.startswith("lokr"):
        names = ", ".join(theirs.rpartition(".")[2] for theirs, _ in layers)
        raise ConfigError(
            f"transformers has {names} in place of {ours}, and a Kronecker product cannot be split between them; use "
            "export.adapter=merge, or train LoKr with adapter.targets=[attention.output,mlp.down]"
        )
    sizes = [size for _, size in layers]
    if part.startswith("lora_embedding_A"):
        tensor = tensor[:, : sizes[0]]
    # Rows beyond those of transformers' layers are padding of the vocabulary.
    rows = tensor[: sum(sizes)].split(sizes) if part.startswith(BY_ROWS) else [tensor] * len(layers)
    # Cloned, because safetensors refuses tensors that share memory.
    return {f"{PREFIX}{theirs}.{part}": row.clone() for (theirs, _), row in zip(layers, rows, strict=True)}
