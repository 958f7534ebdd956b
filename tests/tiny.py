"""A transformer small enough for a test, in the variant under test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretune.core.config import validate
from pretune.model.config import ModelConfig
from pretune.model.huggingface.weights import load_huggingface, to_huggingface
from pretune.model.transformer import Transformer

_TINY: dict[str, Any] = {
    "num_layers": 2,
    "dim": 32,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 8,
    "mlp_dim": 48,
    "vocab_size": 61,
    "vocab_multiple_of": 1,
    "architecture": None,
    "max_sequence_length": 32,
    "activation": "swiglu",
    "norm": {"kind": "rmsnorm", "eps": 1e-5, "learned": True, "offset": 0, "placement": "before"},
    "qk_norm": False,
    "qk_norm_over": "head",
    "attention_scale": 1.0,
    "attention_softcap": None,
    "window": None,
    "value_embeddings": False,
    "residual_scalars": False,
    "learned_positions": False,
    "normalize_embedding": False,
    "scale_embedding": False,
    "bias": {"qkv": False, "attention_output": False, "mlp": False},
    "tied_embeddings": True,
    "dropout": 0.0,
    "softcap": None,
    "init": {"std": 0.2, "embedding_std": 0.2, "head_std": 0.2, "output": "plain"},
    "rope": {"theta": 1e4, "local_theta": None, "fraction": 1.0, "scaling": None, "pattern": "R"},
}


_WINDOWS = {"size": 5, "pattern": "SL", "full_last_layer": False}
_GEMMA: dict[str, Any] = {
    "activation": "geglu",
    "norm": {"offset": 1, "placement": "both"},
    "scale_embedding": True,
    "window": _WINDOWS,
    "head_dim": 16,
    "num_kv_heads": 2,
}
FAMILY_SWITCHES: dict[str, dict[str, Any]] = {
    "olmo2": {"norm": {"placement": "after"}, "qk_norm": True, "qk_norm_over": "all_heads", "num_kv_heads": 2},
    "gemma": {"activation": "geglu", "norm": {"offset": 1}, "scale_embedding": True, "head_dim": 16},
    "gemma2": {**_GEMMA, "attention_scale": 4 / 3, "attention_softcap": 2.0, "softcap": 3.0},
    "gemma3_text": {**_GEMMA, "attention_scale": 0.5, "qk_norm": True, "rope": {"theta": 1e4, "local_theta": 30.0}},
}
"""What models of these families have that Llama has not, with model.architecture left null."""

_ORIGINAL = {"original_max_position_embeddings": 16}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear", "factor": 2.0},
    "ntk": {"kind": "ntk", "factor": 3.0},
    "dynamic": {"kind": "dynamic", "factor": 4.0, **_ORIGINAL},
    "yarn": {
        "kind": "yarn",
        "factor": 2.0,
        "attention_factor": None,
        "beta_fast": 2.0,
        "beta_slow": 0.1,
        "mscale": None,
        "mscale_all_dim": None,
        "truncate": False,
        **_ORIGINAL,
    },
    "longrope": {
        "kind": "longrope",
        "short_factor": [1.0, 1.2, 1.5, 2.0],
        "long_factor": [1.5, 2.0, 4.0, 9.0],
        "attention_factor": 1.3,
        **_ORIGINAL,
    },
    "llama3": {"kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_ORIGINAL},
}
"""Each rule of model.rope.scaling, for heads 8 wide and texts that are longer than 16 tokens."""


GPT2: dict[str, Any] = {
    "learned_positions": True,
    "rope": {"theta": 1e4, "fraction": 0.0, "scaling": None, "pattern": "R"},
    "norm": {"kind": "layernorm", "eps": 1e-5, "learned": True},
    "bias": {"qkv": True, "attention_output": True, "mlp": True},
    "activation": "gelu",
    "mlp_dim": 128,
}
"""What makes a GPT-2 of the tiny configuration."""


def stretched(rule: str) -> dict[str, Any]:
    """The section model.rope with that rule."""
    return {"theta": 100.0, "fraction": 1.0, "scaling": SCALINGS[rule], "pattern": "R"}


def transformers_shape(config: ModelConfig) -> dict[str, Any]:
    """The values of `config` under the names that transformers' Llama and similar models use."""
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_sequence_length,
        "rms_norm_eps": config.norm.eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope.theta},
        "tie_word_embeddings": config.tied_embeddings,
    }


def transformers_llama(model: Transformer) -> Any:
    """transformers' Llama with the weights of `model`, in float32."""
    import transformers

    shape = {**transformers_shape(model.config), "use_cache": False}
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).float()
    reference.load_state_dict(to_huggingface(model.state_dict(), model.config), strict=False)
    return reference


def document_ids(rows: int, length: int) -> Tensor:
    """Ids [rows, length] of documents of any length, fifty tokens on average."""
    ends = torch.rand(rows, length, generator=torch.Generator().manual_seed(2)) < 0.02
    return ends.cumsum(1, dtype=torch.int32)


def tiny_config(**changes: Any) -> ModelConfig:
    """The tiny configuration with other values; those of a section (norm, rope) are added to the tiny one's."""
    sections = {
        key: _TINY[key] | value
        for key, value in changes.items()
        if isinstance(value, dict) and isinstance(_TINY.get(key), dict)
    }
    return validate(ModelConfig, _TINY | changes | sections)


def tiny_model(seed: int = 0, **changes: Any) -> Transformer:
    """A tiny transformer with seeded weights, including norms, biases and gates: none stays at 0 or 1."""
    model, generator = Transformer(tiny_config(**changes)), torch.Generator().manual_seed(seed)
    model.reset_parameters(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or not parameter.any():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def imported(state_dict: Mapping[str, Tensor], config: ModelConfig) -> Transformer:
    """A model of that shape with the weights of one of transformers'."""
    model = Transformer(config)
    load_huggingface(state_dict, model)
    return model
