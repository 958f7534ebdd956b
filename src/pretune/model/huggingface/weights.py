"""Convert weights between our names and Hugging Face's, for Llama, Mistral, Qwen2, Qwen3, Arcee and Apertus.

Both sides are plain mappings from names to tensors. Hugging Face has separate matrices for queries, keys and values
(and for gate and up); we stack them into one, in that order. The rotary layout is the same, so no rows are permuted.
Features that only we have are folded into the weights beforehand (folding.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from pretune.core.config import ConfigError, InputError
from pretune.model.config import GATED, ModelConfig
from pretune.model.huggingface.architectures import APERTUS, NANOCHAT, architecture
from pretune.model.huggingface.nanochat import to_nanochat

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


Shape = tuple[int, ...]
Parts = list[tuple[str, Shape]]
"""Names and shapes of the Hugging Face tensors that make up one of ours, stacked along the first axis."""


def from_huggingface(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Convert a Hugging Face causal language model's weights for `Transformer.load_state_dict`.

    Padding rows of the embedding and head are zeros. Raises InputError for a weight that is missing, has another shape,
    or has no place in the model; ConfigError for a model without a Hugging Face counterpart.
    """
    _check_all_used(state_dict, config)
    ours: dict[str, Tensor] = {}
    for name, parts in _names(config):
        tensors = [_take(state_dict, part, shape) for part, shape in parts]
        ours[name] = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    for name in ("embedding.weight", "head.weight"):
        if name in ours:
            missing = config.padded_vocab_size - ours[name].shape[0]
            ours[name] = F.pad(ours[name], (0, 0, 0, missing))
    return ours


def to_huggingface(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `from_huggingface`: padding rows are left out; tied weights appear once, as the embedding."""
    if architecture(config) is NANOCHAT:
        return to_nanochat(state_dict, config)
    theirs: dict[str, Tensor] = {}
    for name, parts in _names(config):
        rows = [shape[0] for _, shape in parts]
        tensors = state_dict[name][: sum(rows)].split(rows)
        theirs.update((part, tensor) for (part, _), tensor in zip(parts, tensors, strict=True))
    return theirs


def split_layers(config: ModelConfig) -> dict[str, list[tuple[str, int]]]:
    """For each of our linear layers, by name: the Hugging Face layers that it stacks, with their rows, in order."""
    return {
        ours.removesuffix(".weight"): [(part.removesuffix(".weight"), shape[0]) for part, shape in parts]
        for ours, parts in _names(config)
        if len(parts[0][1]) == 2
    }


def _names(config: ModelConfig) -> Iterator[tuple[str, Parts]]:
    if architecture(config) is NANOCHAT:
        raise ConfigError("models with a softcap (NanoChat) and their adapters can be exported, but not imported")
    yield "embedding.weight", [(_EMBEDDING, (config.vocab_size, config.dim))]
    yield "norm.weight", [("model.norm.weight", (config.dim,))]
    if not config.tied_embeddings:
        yield "head.weight", [(_HEAD, (config.vocab_size, config.dim))]
    for index in range(config.num_layers):
        for ours, parts in _block_names(config):
            yield f"layers.{index}.{ours}", [(f"model.layers.{index}.{part}", shape) for part, shape in parts]


def _block_names(config: ModelConfig) -> Iterator[tuple[str, Parts]]:
    norms = ("input_layernorm", "post_attention_layernorm")
    if architecture(config) is APERTUS:
        norms = ("attention_layernorm", "feedforward_layernorm")
    yield "attention_norm.weight", [(f"{norms[0]}.weight", (config.dim,))]
    yield "mlp_norm.weight", [(f"{norms[1]}.weight", (config.dim,))]
    if config.qk_norm:
        yield "attention.query_norm.weight", [("self_attn.q_norm.weight", (config.head_dim,))]
        yield "attention.key_norm.weight", [("self_attn.k_norm.weight", (config.head_dim,))]
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv = [("self_attn.q_proj", queries), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys)]
    yield from _linear("attention.qkv", qkv, config.dim, config.bias.qkv)
    yield from _linear("attention.output", [("self_attn.o_proj", config.dim)], queries, config.bias.attention_output)
    gate, up = ("mlp.gate_proj", config.mlp_dim), ("mlp.up_proj", config.mlp_dim)
    if config.activation in GATED:
        yield from _linear("mlp.gate_up", [gate, up], config.dim, config.bias.mlp)
    else:
        yield from _linear("mlp.up", [up], config.dim, config.bias.mlp)
    yield from _linear("mlp.down", [("mlp.down_proj", config.dim)], config.mlp_dim, config.bias.mlp)


def _linear(ours: str, parts: list[tuple[str, int]], columns: int, bias: bool) -> Iterator[tuple[str, Parts]]:
    yield f"{ours}.weight", [(f"{part}.weight", (rows, columns)) for part, rows in parts]
    if bias:
        yield f"{ours}.bias", [(f"{part}.bias", (rows,)) for part, rows in parts]


def _take(state_dict: Mapping[str, Tensor], name: str, shape: Shape) -> Tensor:
    if name not in state_dict:
        raise InputError(f"the checkpoint has no weight '{name}', which the model's configuration requires")
    if state_dict[name].shape != shape:
        raise InputError(
            f"the checkpoint's '{name}' has shape {list(state_dict[name].shape)}, but the model's configuration "
            f"requires {list(shape)}"
        )
    return state_dict[name]


def _check_all_used(state_dict: Mapping[str, Tensor], config: ModelConfig) -> None:
    # If the configuration omitted a bias, ignoring it here would silently give a different model.
    known = {part for _, parts in _names(config) for part, _ in parts} | {_HEAD}
    unknown = [name for name in state_dict if name not in known and not name.endswith("rotary_emb.inv_freq")]
    if unknown:
        raise InputError(
            f"the checkpoint has {len(unknown)} weights that the model's configuration has no place for, such as "
            f"'{unknown[0]}'; see num_layers, bias and qk_norm"
        )
