"""Tiny models of transformers that our own transformer cannot hold, with random weights, and their sections."""

from __future__ import annotations

from typing import Any

import torch

from pretune.core.config import validate
from pretune.model.transformers_model.config import TransformersConfig, section_of
from pretune.model.transformers_model.model import TransformersModel

_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_SHAPE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    **_IDS,
}
_NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "dropout": 0.0}
SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {**_SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phi": {**_SHAPE, **_NO_DROPOUT, "partial_rotary_factor": 0.5},
    "gpt_neox": {**_SHAPE, "rotary_pct": 0.25, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "opt": {**_SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.0, "init_std": 0.2},
    "mamba": {"vocab_size": 101, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, **_IDS},
    "bloom": {"vocab_size": 101, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2, **_IDS},
    "qwen2_moe": {**_SHAPE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                  "shared_expert_intermediate_size": 24},
    "stablelm": {**_SHAPE, "use_qkv_bias": True},
    "cohere": {**_SHAPE, "logit_scale": 0.3},
    "granite": {**_SHAPE, "logits_scaling": 3.0, "residual_multiplier": 0.7},
    "gemma2": {**_SHAPE, "head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 5},
}  # fmt: skip
"""The config.json of each, by model_type."""


def library_section(model_type: str, **changes: Any) -> TransformersConfig:
    """The model section of a case."""
    return validate(TransformersConfig, section_of({"model_type": model_type, **SIZES[model_type], **changes}))


def library_model(model_type: str, **changes: Any) -> TransformersModel:
    """A model of ours with seeded weights: norms, biases and gates too, of which none stays at 0 or 1."""
    model = TransformersModel(library_section(model_type, **changes))
    model.reset_parameters(torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.dim() == 1 or not parameter.any():
                parameter.add_(0.2 * torch.randn(parameter.shape))
    assert model.check() is None or not model.takes_positions
    return model
