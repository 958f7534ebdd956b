"""The keys of a GPT-2's config.json, which has names of its own."""

from __future__ import annotations

from typing import Any

from pretune.core.config import InputError
from pretune.model.config import ModelConfig
from pretune.model.huggingface.keys import Keys

GPT2_IGNORED = frozenset({
    "n_ctx", "attn_pdrop", "gradient_checkpointing", "reorder_and_upcast_attn", "summary_type", "summary_use_proj",
    "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
})  # fmt: skip
"""Keys that do not say what a language model computes: n_ctx is n_positions, dropout is a choice of training,
reorder_and_upcast_attn only says in which precision attention is computed, and summaries are those of other heads."""


def read_gpt2(keys: Keys, activation: str) -> dict[str, Any]:
    """What differs between GPT-2s, as a model section with that `activation` of ours.

    Raises InputError for heads that do not fit, and keys whose values cannot be computed.
    """
    dim, num_heads = keys.take("n_embd", int), keys.take("n_head", int)
    if num_heads < 1 or dim % num_heads:
        raise InputError(f"{keys.path}: n_embd = {dim} must be a multiple of n_head = {num_heads}")
    keys.must_be("scale_attn_weights", True, default=True)
    keys.must_be("scale_attn_by_inverse_layer_idx", False, default=False)
    return {
        "num_layers": keys.take("n_layer", int),
        "dim": dim,
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": dim // num_heads,
        "mlp_dim": keys.take("n_inner", int, default=4 * dim),
        "max_sequence_length": keys.take("n_positions", int),
        "activation": activation,
        "norm": {"eps": keys.take("layer_norm_epsilon", float, default=1e-5)},
        "attention_scale": 1.0,
        "window": None,
        "bias": {"qkv": True, "attention_output": True, "mlp": True},
        "rope": {"theta": 10000.0, "local_theta": None, "scaling": None, "pattern": "R"},
    }


def written_gpt2(config: ModelConfig, activation: str) -> dict[str, Any]:
    """The same keys for a model with transformers' name `activation`."""
    return {
        "n_embd": config.dim,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": None if config.mlp_dim == 4 * config.dim else config.mlp_dim,
        "n_positions": config.max_sequence_length,
        "n_ctx": config.max_sequence_length,  # where llama.cpp looks
        "activation_function": "gelu_new" if config.activation == "gelu" else activation,
        "layer_norm_epsilon": config.norm.eps,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    }
