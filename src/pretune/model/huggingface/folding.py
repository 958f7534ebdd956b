"""Fold features that only Pretune has into the weights, where possible, so that other libraries can run the model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from pretune.core.config import ConfigError
from pretune.model.config import ModelConfig
from pretune.model.huggingface.weights import split_layers


def portable_config(config: ModelConfig) -> ModelConfig:
    """The configuration of an equivalent model whose weights `portable_weights` returns.

    Norms without weights get weights of ones. If some of an attention's matrices have biases, the others get biases of
    zeros. The attention scale is folded into the queries. A normalized embedding becomes a table of normalized vectors,
    and a head tied to it gets its own table. Features that cannot be folded into weights stay as they are. A model that
    says its architecture is left unchanged, and so is one with a softcap: only NanoChat is chosen for it, with
    unweighted norms.
    """
    if config.architecture is not None or config.norm.kind != "rmsnorm" or config.softcap is not None:
        return config
    attention = config.bias.qkv or config.bias.attention_output
    changes = {
        "bias": config.bias.model_copy(update={"qkv": attention, "attention_output": attention}),
        "attention_scale": 1.0,
        "norm": config.norm.model_copy(update={"learned": True}),
        "tied_embeddings": config.tied_embeddings and not config.normalize_embedding,
        "normalize_embedding": False,
    }
    return config.model_copy(update=changes)


def portable_weights(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The weights for `portable_config(config)`."""
    weights, new = dict(state_dict), portable_config(config)
    if new.norm.learned and not config.norm.learned:
        weights |= _ones(config)
    weights |= _zeros(config, new)
    if new.attention_scale != config.attention_scale:
        _scale_queries(weights, config)
    if config.normalize_embedding and not new.normalize_embedding:
        table, learned = weights["embedding.weight"], weights.pop("embedding_norm.weight", None)
        weights["embedding.weight"] = F.rms_norm(table.float(), (config.dim,), learned, config.norm.eps).to(table.dtype)
        if config.tied_embeddings:
            weights["head.weight"] = table
    return weights


def adapter_layers(config: ModelConfig, on_embedding: bool) -> dict[str, list[tuple[str, int]]]:
    """For each of our linear layers and the embedding: the layers in transformers that it stacks, with their rows; for
    adapters that belong on the weights of either side.

    Raises ConfigError where an adapter fits only one of the two, because our features are folded into the weights.
    """
    shape = portable_config(config)
    merged = "an adapter alone fits only one of the two: merge it (export.adapter=merge)"
    if shape.attention_scale != config.attention_scale and not shape.qk_norm:
        raise ConfigError(f"exports have model.attention_scale in the queries' weights, so {merged}")
    if on_embedding and shape.normalize_embedding != config.normalize_embedding:
        raise ConfigError(f"exports have model.normalize_embedding in the embedding, so {merged}")
    return split_layers(shape)


def _ones(config: ModelConfig) -> dict[str, Tensor]:
    """Weights of ones for all norms except the embedding's."""
    sizes = {"norm.weight": config.dim}
    for index in range(config.num_layers):
        sizes |= {f"layers.{index}.{name}.weight": config.dim for name in ("attention_norm", "mlp_norm")}
        if config.qk_norm:
            sizes |= {f"layers.{index}.attention.{name}.weight": config.head_dim for name in ("query_norm", "key_norm")}
    return {name: torch.ones(size) for name, size in sizes.items()}


def _zeros(config: ModelConfig, new: ModelConfig) -> dict[str, Tensor]:
    """Biases of zeros for the matrices of attention that have one only in the portable model."""
    missing = {}
    if new.bias.qkv and not config.bias.qkv:
        missing["qkv"] = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    if new.bias.attention_output and not config.bias.attention_output:
        missing["output"] = config.dim
    layers = range(config.num_layers)
    return {f"layers.{at}.attention.{name}.bias": torch.zeros(size) for at in layers for name, size in missing.items()}


def _scale_queries(weights: dict[str, Tensor], config: ModelConfig) -> None:
    queries = config.num_heads * config.head_dim
    for index in range(config.num_layers):
        attention = f"layers.{index}.attention"
        if config.qk_norm:
            weights[f"{attention}.query_norm.weight"] = (
                weights[f"{attention}.query_norm.weight"] * config.attention_scale
            )
            continue
        for name in (f"{attention}.qkv.weight", f"{attention}.qkv.bias"):
            if name in weights:
                rows = weights[name].split([queries, len(weights[name]) - queries])
                weights[name] = torch.cat((rows[0] * config.attention_scale, rows[1]))
