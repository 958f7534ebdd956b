"""Choose the transformers architecture that computes what a model computes, and write its config.json."""

from __future__ import annotations

from typing import Any, NamedTuple

from pretune.core.config import ConfigError
from pretune.model.config import GATED, ModelConfig
from pretune.model.huggingface.rope_keys import written_rope

ACTIVATIONS = {
    "swiglu": "silu",
    "geglu": "gelu_pytorch_tanh",
    "reglu": "relu",
    "relu_squared": "relu2",
    "gelu": "gelu_pytorch_tanh",
    "silu": "silu",
    "relu": "relu",
}
"""Our activations, and transformers' name for the function in each."""


class Architecture(NamedTuple):
    """model_type, as transformers' AutoConfig knows it, and the class of its causal language model."""

    model_type: str
    name: str


LLAMA = Architecture("llama", "LlamaForCausalLM")
MISTRAL = Architecture("mistral", "MistralForCausalLM")
QWEN2 = Architecture("qwen2", "Qwen2ForCausalLM")
QWEN3 = Architecture("qwen3", "Qwen3ForCausalLM")
SMOLLM3 = Architecture("smollm3", "SmolLM3ForCausalLM")
PHI3 = Architecture("phi3", "Phi3ForCausalLM")
ARCEE = Architecture("arcee", "ArceeForCausalLM")
APERTUS = Architecture("apertus", "ApertusForCausalLM")
NANOCHAT = Architecture("nanochat", "NanoChatForCausalLM")


def architecture(config: ModelConfig) -> Architecture:
    """The architecture that fits a portable model: Llama or Qwen3 for gated activations, else Arcee or Apertus; with a
    softcap, only NanoChat.

    Never Qwen2: for its model_type, transformers' AutoTokenizer replaces the pre-tokenizer by Qwen's own, whatever
    tokenizer.json says. A Llama with biases of zeros computes the same. Raises ConfigError, naming the key, for a
    feature that none of them has.
    """
    if _is_nanochat(config):
        return NANOCHAT
    _check(config)
    if config.activation in GATED:
        return QWEN3 if config.qk_norm else LLAMA
    return APERTUS if config.qk_norm else ARCEE


def huggingface_config(config: ModelConfig, eos_id: int, dtype: str) -> dict[str, Any]:
    """The content of config.json for weights from `to_huggingface`, stored as `dtype`."""
    kind, bias = architecture(config), config.bias
    content = {
        "architectures": [kind.name],
        "model_type": kind.model_type,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "hidden_act": ACTIVATIONS[config.activation],
        "vocab_size": config.vocab_size,
        **written_rope(config),
        "rms_norm_eps": config.norm.eps,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": bias.qkv,
        "attention_dropout": 0.0,
        "initializer_range": config.init.std,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "use_cache": True,
        "dtype": dtype,
    }
    if kind is NANOCHAT:
        content["final_logit_softcapping"] = config.softcap
    return content | ({"mlp_bias": bias.mlp} if kind in (LLAMA, ARCEE) else {})


def _is_nanochat(config: ModelConfig) -> bool:
    plain = config.window is None and not config.value_embeddings and not config.residual_scalars
    bare = config.norm.kind == "rmsnorm" and not config.norm.learned and config.qk_norm and config.normalize_embedding
    biased = config.bias.qkv or config.bias.attention_output or config.bias.mlp
    whole = (
        config.rope.fraction == 1
        and "N" not in config.rope.pattern
        and config.attention_scale == 1
        and not config.tied_embeddings
    )
    return config.softcap is not None and config.activation not in GATED and plain and bare and whole and not biased


def _check(config: ModelConfig) -> None:
    """Raise ConfigError for features that no architecture has."""
    faults = {
        f"model.softcap = {config.softcap}": config.softcap is not None,
        f"model.norm.kind = {config.norm.kind}": config.norm.kind != "rmsnorm",
        "model.norm.learned = false": not config.norm.learned,
        f"model.attention_scale = {config.attention_scale:g}": config.attention_scale != 1,
        "model.window": config.window is not None,
        "model.value_embeddings": config.value_embeddings,
        "model.residual_scalars": config.residual_scalars,
        "model.normalize_embedding": config.normalize_embedding,
        f"model.rope.fraction = {config.rope.fraction:g}": config.rope.fraction != 1,
        f"model.rope.pattern = {config.rope.pattern}": "N" in config.rope.pattern,
        "model.bias.mlp = true with model.qk_norm = true": config.bias.mlp and config.qk_norm,
    }
    found = [fault for fault, there in faults.items() if there]
    if found:
        raise ConfigError(
            f"no transformers architecture computes what this model does: {'; '.join(found)}. Llama, Qwen3, Arcee "
            "and Apertus have learned rmsnorms, fully rotated heads and none of these features; nanochat has "
            "model.softcap with relu_squared, qk_norm, normalize_embedding, norm.learned=false and an untied head"
        )
