"""Convert weights between our names and Hugging Face's.

Both sides are plain mappings from names to tensors, and one table (`_names`) serves both directions. Hugging Face has
separate matrices for queries, keys and values (and for gate and up); we stack them into one, in that order. The rotary
layout is the same, so no rows are permuted, except NanoChat's: it rotates by the opposite angle, and swapping the two
halves of each query and key makes the results equal. (It normalizes queries and keys after rotation, and we before;
without learned weights that is the same.) GPT-2 stores its matrices transposed. Features that only we have are folded
into the weights beforehand (folding.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pretune.core.config import ConfigError, InputError
from pretune.model.config import GATED, ModelConfig
from pretune.model.huggingface.families import Family
from pretune.model.huggingface.fitting import family_of
from pretune.model.transformer import Transformer

HEAD = "lm_head.weight"

_BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Ends of the names of stored tensors that are not weights: they follow from config.json."""


_NORMS = {
    "before": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "after": {"post_attention_norm": "post_attention_layernorm", "post_mlp_norm": "post_feedforward_layernorm"},
    "both": {
        "attention_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    },
}
"""The norms of a block by norm.placement: ours, and the names that all families have for them."""

_QK_NORMS = {"query_norm": "q_norm", "key_norm": "k_norm"}


class Part(NamedTuple):
    """A Hugging Face tensor: name, our shape of it, the head width if the two halves of each head's rows are swapped,
    and whether it is stored transposed."""

    name: str
    shape: tuple[int, ...]
    swapped: int | None = None
    transposed: bool = False

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transposed else self.shape

    def turned(self, tensor: Tensor) -> Tensor:
        """The tensor from one layout in the other; its own inverse."""
        if self.transposed:
            return tensor.T
        if self.swapped is None:
            return tensor
        return tensor.unflatten(0, (-1, 2, self.swapped // 2)).flip(1).flatten(0, 2)


Parts = list[Part]
"""The Hugging Face tensors that make up one of ours, stacked along the first axis."""


@torch.no_grad()
def load_huggingface(state_dict: Mapping[str, Tensor], model: Transformer) -> None:
    """Load a Hugging Face causal language model's weights into `model`, whatever dtypes they are stored in.

    Padding rows of the embedding and head become zeros. Each tensor of `state_dict` is looked up once, when its turn
    comes, so that it may be read from a file then. Raises InputError for a weight that is missing, has another shape,
    or has no place in the model; ConfigError for a model without a Hugging Face counterpart, see `family_of`.
    """
    config, own = model.config, model.state_dict()
    names = list(_names(config, family_of(config)))
    _check_all_used(state_dict, {part.name for _, parts in names for part in parts})
    for name, parts in names:
        filled = 0
        for part in parts:
            rows = part.turned(_take(state_dict, part))
            own[name][filled : filled + len(rows)].copy_(rows)
            filled += len(rows)
        own[name][filled:].zero_()


def to_huggingface(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `load_huggingface`: padding rows are left out; tied weights appear once, as the embedding."""
    theirs: dict[str, Tensor] = {}
    for name, parts in _names(config, family_of(config)):
        rows = [part.shape[0] for part in parts]
        tensors = state_dict[name][: sum(rows)].split(rows)
        theirs.update((part.name, part.turned(tensor)) for part, tensor in zip(parts, tensors, strict=True))
    return theirs


def split_layers(config: ModelConfig) -> dict[str, list[tuple[str, int]]]:
    """For each of our linear layers, by name: the Hugging Face layers that it stacks, with their rows, in order."""
    family = family_of(config)
    if family.turned:
        raise ConfigError(
            f"an adapter of a {family.model_type}, which orders the rows of queries and keys in another way, is "
            "neither taken nor exported alone: merge it (export.adapter=merge, or merge_and_unload of peft)"
        )
    return {
        ours.removesuffix(".weight"): [(part.name.removesuffix(".weight"), part.shape[0]) for part in parts]
        for ours, parts in _names(config, family)
        if len(parts[0].shape) == 2 and ours != "position_embedding.weight"
    }


def _names(config: ModelConfig, family: Family) -> Iterator[tuple[str, Parts]]:
    """Our tensors, each with its parts in a model of that family."""
    embedding, layers, norm = family.places
    yield "embedding.weight", [Part(f"{embedding}.weight", (config.vocab_size, config.dim))]
    if config.learned_positions:
        yield "position_embedding.weight", [Part("transformer.wpe.weight", (config.max_sequence_length, config.dim))]
    if not config.tied_embeddings:
        yield "head.weight", [Part(HEAD, (config.vocab_size, config.dim))]
    yield from _norm("norm", norm, config)
    for index in range(config.num_layers):
        for ours, parts in _block_names(config, family):
            renamed = []
            for part in parts:
                stem, end = part.name.rsplit(".", 1)
                name = f"{layers}.{index}.{family.names.get(stem, stem)}.{end}"
                renamed.append(part._replace(name=name, transposed=family.transposed and len(part.shape) == 2))
            yield f"layers.{index}.{ours}", renamed


def _block_names(config: ModelConfig, family: Family) -> Iterator[tuple[str, Parts]]:
    """The same within a block, by Llama's names."""
    for ours, theirs in _NORMS[config.norm.placement].items():
        yield from _norm(ours, theirs, config)
    if config.norm.learned and config.qk_norm:
        for (ours, theirs), size in zip(_QK_NORMS.items(), config.qk_norm_sizes, strict=True):
            yield f"attention.{ours}.weight", [Part(f"self_attn.{theirs}.weight", (size,))]
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv = [("self_attn.q_proj", queries), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys)]
    if family.stacked:
        qkv = [("self_attn.qkv_proj", queries + 2 * keys)]
    for ours, parts in _linear("attention.qkv", qkv, config.dim, config.bias.qkv):
        if family.turned:
            parts = [*(part._replace(swapped=config.head_dim) for part in parts[:2]), parts[2]]
        yield ours, parts
    yield from _linear("attention.output", [("self_attn.o_proj", config.dim)], queries, config.bias.attention_output)
    gate, up = ("mlp.gate_proj", config.mlp_dim), ("mlp.up_proj", config.mlp_dim)
    if config.activation in GATED:
        gate_up = [("mlp.gate_up_proj", 2 * config.mlp_dim)] if family.stacked else [gate, up]
        yield from _linear("mlp.gate_up", gate_up, config.dim, config.bias.mlp)
    else:
        yield from _linear("mlp.up", [up], config.dim, config.bias.mlp)
    yield from _linear("mlp.down", [("mlp.down_proj", config.dim)], config.mlp_dim, config.bias.mlp)


def _norm(ours: str, theirs: str, config: ModelConfig) -> Iterator[tuple[str, Parts]]:
    if config.norm.learned:
        yield f"{ours}.weight", [Part(f"{theirs}.weight", (config.dim,))]
    if config.norm.learned and config.norm.kind == "layernorm":
        yield f"{ours}.bias", [Part(f"{theirs}.bias", (config.dim,))]


def _linear(ours: str, parts: list[tuple[str, int]], columns: int, bias: bool) -> Iterator[tuple[str, Parts]]:
    yield f"{ours}.weight", [Part(f"{part}.weight", (rows, columns)) for part, rows in parts]
    if bias:
        yield f"{ours}.bias", [Part(f"{part}.bias", (rows,)) for part, rows in parts]


def _take(state_dict: Mapping[str, Tensor], part: Part) -> Tensor:
    if part.name not in state_dict:
        raise InputError(f"the checkpoint has no weight '{part.name}', which the model's configuration requires")
    tensor = state_dict[part.name]
    if tensor.shape != part.stored_shape:
        raise InputError(
            f"the checkpoint's '{part.name}' has shape {list(tensor.shape)}, but the model's configuration "
            f"requires {list(part.stored_shape)}"
        )
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        raise InputError(
            f"the checkpoint's '{part.name}' is {tensor.dtype}, so it is quantized: use the model's unquantized weights"
        )
    return tensor


def _check_all_used(state_dict: Mapping[str, Tensor], known: set[str]) -> None:
    # If the configuration omitted a bias, ignoring it here would silently give a different model.
    unknown = [name for name in state_dict if name not in known | {HEAD} and not name.endswith(_BUFFERS)]
    if unknown:
        raise InputError(
            f"the checkpoint has {len(unknown)} weights that the model's configuration has no place for, such as "
            f"'{unknown[0]}'; see num_layers, bias and qk_norm"
        )
