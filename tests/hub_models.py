"""Tiny models of transformers with random weights, one for each family that can be read."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers

ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
SHAPE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    **ROPE,
}
GPT2_SHAPE: dict[str, Any] = {
    "vocab_size": 101,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 96,
    "initializer_range": 0.2,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 3.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.1, 1.7],
    "long_factor": [2.0, 5.0],
    "partial_rotary_factor": 0.5,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama tied, wide heads": ("Llama", {"tie_word_embeddings": True, "head_dim": 16, "num_key_value_heads": 1}),
    "llama 3.1": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral 0.1": ("Mistral", {"sliding_window": 7}),
    "mistral 0.3": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "sliding_window": 4, "use_sliding_window": False}),
    "qwen2 windows": ("Qwen2", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 windows": (
        "Qwen3",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
    "smollm3 by interval": ("SmolLM3", {"no_rope_layer_interval": 2, "attention_bias": True}),
    "phi3": ("Phi3", {"sliding_window": 6, "vocab_size": 128}),
    # Texts of these grow beyond the original length while they are generated.
    "llama dynamic": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
            "max_position_embeddings": 32,
        },
    ),
    "qwen2.5 yarn": ("Qwen2", {"rope_parameters": YARN, "max_position_embeddings": 32}),
    "phi3 longrope": ("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    "phi3 partial": (
        "Phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "olmo2": ("Olmo2", {}),
    "olmo2 biases, wide heads": ("Olmo2", {"attention_bias": True, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma untied": ("Gemma", {"head_dim": 8, "tie_word_embeddings": False, "num_key_value_heads": 1}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "query_pre_attn_scalar": 9,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma2 without caps": (
        "Gemma2",
        {"head_dim": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": 7},
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "query_pre_attn_scalar": 11,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
            },
        },
    ),
    "gemma3 capped": (
        "Gemma3Text",
        {
            "head_dim": 8,
            "final_logit_softcapping": 3.0,
            "rope_parameters": None,
            "num_hidden_layers": 6,
        },
    ),
    "arcee": ("Arcee", {"mlp_bias": True}),
    "apertus": ("Apertus", {"hidden_act": "relu2"}),
    "gpt2": ("GPT2", {"n_positions": 96}),
    "gpt2 relu, untied, narrow": ("GPT2", {"activation_function": "relu", "n_inner": 48, "tie_word_embeddings": False}),
    "nanochat": ("NanoChat", {"final_logit_softcapping": 4.0}),
}


def reference_config(case: str, **changes: Any) -> Any:
    """transformers' configuration."""
    kind, settings = FAMILIES[case]
    shape = GPT2_SHAPE if kind == "GPT2" else SHAPE
    values = copy.deepcopy(shape | settings | changes)  # transformers adds to the rope_parameters that it is given
    return getattr(transformers, f"{kind}Config")(**values)


def reference(case: str, **changes: Any) -> Any:
    """transformers' model, in float32, in training mode (no dropout)."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(reference_config(case, **changes))
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms start at one and biases at zero, which would hide many mistakes
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    return model.float().train()
