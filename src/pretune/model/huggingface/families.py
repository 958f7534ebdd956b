"""The model families of transformers: what each computes, in keys of the model section, and how its files say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

_PLAIN: dict[str, Any] = {
    "softcap": None,
    "attention_softcap": None,
    "norm.kind": "rmsnorm",
    "norm.learned": True,
    "norm.offset": 0,
    "norm.placement": "before",
    "qk_norm": False,
    "qk_norm_over": "head",
    "value_embeddings": False,
    "residual_scalars": False,
    "learned_positions": False,
    "normalize_embedding": False,
    "scale_embedding": False,
}
"""Keys of the model section with the value that they have in every family whose record does not say otherwise."""


class Family(NamedTuple):
    """A family: `model_type`, as transformers' AutoConfig knows it, and the class of its causal language model."""

    model_type: str
    name: str
    always: Mapping[str, Any] = {}
    """Keys of the model section with the only value that they have in this family, where it is not that of _PLAIN."""
    numbers: Mapping[str, tuple[str, float | None]] = {}
    """Keys of the model section that config.json has: its key, and the value that transformers gives it if left out;
    null is a value."""
    gated: bool = True
    activation: tuple[str, str | None] = ("hidden_act", None)
    """The key of the activation, and the value that transformers gives it if left out; None: it must be given."""
    biases: Literal["none", "qkv", "attention", "all", "every"] = "attention"
    """none; qkv (always those, and no others); attention (attention_bias: all of attention's or none); all (also
    mlp_bias); or every (always all)."""
    windows: Literal["none", "off", "every", "some", "typed"] = "none"
    """none, off (there are keys, which must say none), every (each layer has sliding_window), some (of the layers, as
    layer_types says, or use_sliding_window and max_window_layers) or typed (as layer_types says)."""
    window: int | None = 4096
    """The window if sliding_window is left out."""
    period: int = 0
    """For typed windows: if layer_types is left out, each period-th layer has none."""
    query_scalar: int | None = None
    """The value of query_pre_attn_scalar if it is left out: queries are divided by its root; None: there is no such
    key, and they are divided by the root of head_dim."""
    unrotated: bool = False
    """Whether layers may have no rotary positions (no_rope_layers)."""
    grouped: bool = True
    """Whether num_key_value_heads must be given; else it is num_attention_heads, as in files older than the key."""
    head_dim: int | None = None
    """The width of a head if it is left out; None: hidden_size / num_attention_heads."""
    says_head_dim: bool = True
    """Whether files always have head_dim; else only those with heads of another width."""
    tied: bool = False
    """Whether the head is tied to the embedding if tie_word_embeddings is left out."""
    theta: float | None = None
    """Base of the rotary frequencies if neither spelling gives one; None: it must be given."""
    local_theta: float | None = None
    """The base in layers with a window, if it is left out; None: there is no such base."""
    longrope: bool = False
    """Whether positions are stretched by longrope only, which has other names in older files, and heads may be rotated
    in part (Phi-3)."""
    names: Mapping[str, str] = {}
    """Names of tensors within a block that it has in place of Llama's."""
    places: tuple[str, str, str] = ("model.embed_tokens", "model.layers", "model.norm")
    """Names of the embedding, the list of blocks and the last norm."""
    transposed: bool = False
    """Whether the matrices of blocks are stored transposed."""
    stacked: bool = False
    """Whether queries, keys and values are one matrix, and gate and up another, as in Pretune."""
    turned: bool = False
    """Whether it rotates by the opposite angle."""

    def fixed(self) -> dict[str, Any]:
        """Keys of the model section with the only value that they have in this family."""
        both = {**_PLAIN, **self.always}
        return {key: value for key, value in both.items() if key not in self.numbers}


LLAMA = Family("llama", "LlamaForCausalLM", biases="all", grouped=False, theta=10000.0)  # Llama 1 and 2 do not say it
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", {"qk_norm": True}, windows="some", head_dim=128)
ARCEE = Family("arcee", "ArceeForCausalLM", gated=False, biases="all", grouped=False)
APERTUS = Family(
    "apertus",
    "ApertusForCausalLM",
    {"qk_norm": True},
    gated=False,
    grouped=False,
    says_head_dim=False,
    names={"input_layernorm": "attention_layernorm", "post_attention_layernorm": "feedforward_layernorm"},
)
NANOCHAT = Family(
    "nanochat",
    "NanoChatForCausalLM",
    {"norm.learned": False, "qk_norm": True, "normalize_embedding": True},
    {"softcap": ("final_logit_softcapping", 15.0)},
    gated=False,
    biases="none",
    grouped=False,
    says_head_dim=False,
    names={"mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"},
    turned=True,
)
GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    {"learned_positions": True, "norm.kind": "layernorm", "rope.fraction": 0.0},
    gated=False,
    activation=("activation_function", "gelu_new"),
    biases="every",
    tied=True,
    names={
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn.qkv_proj": "attn.c_attn",
        "self_attn.o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
    },
    places=("transformer.wte", "transformer.h", "transformer.ln_f"),
    transposed=True,
    stacked=True,
)
"""It has other keys than those below: see gpt2_keys.py."""
_GEMMA: dict[str, Any] = {"norm.offset": 1, "scale_embedding": True}
FAMILIES = {
    family.model_type: family
    for family in (
        LLAMA,
        Family("mistral", "MistralForCausalLM", biases="none", windows="every"),
        Family("qwen2", "Qwen2ForCausalLM", biases="qkv", windows="some", says_head_dim=False),
        QWEN3,
        Family(
            "smollm3",
            "SmolLM3ForCausalLM",
            biases="all",
            windows="off",
            unrotated=True,
            says_head_dim=False,
            tied=True,
        ),
        Family(
            "phi3",
            "Phi3ForCausalLM",
            biases="none",
            windows="every",
            window=None,
            grouped=False,
            says_head_dim=False,
            longrope=True,
            stacked=True,
        ),
        Family(
            "olmo2",
            "Olmo2ForCausalLM",
            {"norm.placement": "after", "qk_norm": True, "qk_norm_over": "all_heads"},
            grouped=False,
            says_head_dim=False,
        ),
        Family(
            "gemma",
            "GemmaForCausalLM",
            _GEMMA,
            activation=("hidden_act", "gelu_pytorch_tanh"),
            head_dim=256,
            tied=True,
        ),
        Family(
            "gemma2",
            "Gemma2ForCausalLM",
            {**_GEMMA, "norm.placement": "both"},
            {"softcap": ("final_logit_softcapping", 30.0), "attention_softcap": ("attn_logit_softcapping", 50.0)},
            activation=("hidden_activation", "gelu_pytorch_tanh"),
            windows="typed",
            period=2,
            query_scalar=256,
            head_dim=256,
            tied=True,
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            {**_GEMMA, "norm.placement": "both", "qk_norm": True},
            {"softcap": ("final_logit_softcapping", None)},  # transformers leaves attn_logit_softcapping out
            activation=("hidden_activation", "gelu_pytorch_tanh"),
            windows="typed",
            period=6,
            query_scalar=256,
            head_dim=256,
            tied=True,
            theta=1e6,
            local_theta=1e4,
        ),
        ARCEE,
        APERTUS,
        NANOCHAT,
        GPT2,
    )
}
