"""The model families of transformers: what each computes, in keys of the model section, and how its files say it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from pretune.core.config import ConfigError
from pretune.model.config import GATED, ModelConfig

_PLAIN: dict[str, Any] = {
    "softcap": None,
    "norm.kind": "rmsnorm",
    "norm.learned": True,
    "qk_norm": False,
    "attention_scale": 1.0,
    "value_embeddings": False,
    "residual_scalars": False,
    "learned_positions": False,
    "normalize_embedding": False,
}
"""Keys of the model section with the value that they have in every family whose record does not say otherwise."""


class Family(NamedTuple):
    """A family: `model_type`, as transformers' AutoConfig knows it, and the class of its causal language model."""

    model_type: str
    name: str
    always: Mapping[str, Any] = {}
    """Keys of the model section with the only value that they have in this family, where it is not that of _PLAIN."""
    numbers: Mapping[str, tuple[str, float]] = {}
    """Keys of the model section that config.json has: its key, and the value that transformers gives it if left out;
    null is a value."""
    gated: bool = True
    biases: Literal["none", "qkv", "attention", "all", "every"] = "attention"
    """none; qkv (always those, and no others); attention (attention_bias: all of attention's or none); all (also
    mlp_bias); or every (always all)."""
    windows: Literal["none", "off", "every", "some"] = "none"
    """none, off (there are keys, which must say none), every (each layer has sliding_window) or some (of the layers, as
    layer_types says, or use_sliding_window and max_window_layers)."""
    window: int | None = 4096
    """The window if sliding_window is left out."""
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
        ARCEE,
        APERTUS,
        NANOCHAT,
        GPT2,
    )
}


def family_of(config: ModelConfig) -> Family:
    """The family that a portable model is exported as: model.architecture, or one that fits.

    Without model.architecture it is Llama or Qwen3 for gated activations, else Arcee or Apertus; with a softcap, only
    NanoChat; with learned positions, GPT-2. Never Qwen2: for its model_type, transformers' AutoTokenizer replaces the
    pre-tokenizer by Qwen's own, whatever tokenizer.json says. A Llama with biases of zeros computes the same. Raises
    ConfigError, naming the keys, for features that the family has not.
    """
    if config.architecture is not None:
        family = FAMILIES[config.architecture]
        found = misfits(config, family)
        if found:
            raise ConfigError(
                f"model.architecture = {family.model_type} contradicts {'; '.join(found)}: change these keys, or set "
                "model.architecture=null, and exports choose one that fits"
            )
        return family
    if config.softcap is not None and not misfits(config, NANOCHAT):
        return NANOCHAT
    if config.learned_positions:
        family = GPT2
    elif config.activation in GATED:
        family = QWEN3 if config.qk_norm else LLAMA
    else:
        family = APERTUS if config.qk_norm else ARCEE
    found = misfits(config, family)
    if found:
        raise ConfigError(
            f"no transformers architecture computes what this model does: {'; '.join(found)}. Llama, Qwen3, Arcee "
            "and Apertus have learned rmsnorms, fully rotated heads and none of these features; nanochat has "
            "model.softcap with relu_squared, qk_norm, normalize_embedding and norm.learned=false; GPT-2 has "
            "model.learned_positions with rope.fraction=0, layernorm, one key and value head per query head, and biases"
        )
    return family


def misfits(config: ModelConfig, family: Family) -> list[str]:
    """What a model has and the family has not, each as `model.key = value`; the keys alone decide, not the sizes."""
    return list(_misfits(config, family))


def _misfits(config: ModelConfig, family: Family) -> Iterator[str]:
    for key, wanted in family.fixed().items():
        if (found := value_of(config, key)) != wanted:
            yield f"model.{key} = {_shown(found)}"
    if (config.activation in GATED) != family.gated:
        yield f"model.activation = {config.activation}"
    yield from _misfit_biases(config, family)
    if family is GPT2 and config.num_kv_heads != config.num_heads:
        yield f"model.num_kv_heads = {config.num_kv_heads}"
    if family is GPT2 and config.head_dim * config.num_heads != config.dim:
        yield f"model.head_dim = {config.head_dim}"
    windows = {config.window_of(layer) for layer in range(config.num_layers)}
    if windows != {None} and (family.windows in ("none", "off") or (family.windows == "every" and None in windows)):
        yield f"model.window.pattern = {config.window.pattern}" if config.window else ""
    if not family.longrope and family is not GPT2 and config.rope.fraction != 1:
        yield f"model.rope.fraction = {config.rope.fraction}"
    if family.longrope and config.rope.scaling is not None and config.rope.scaling.kind not in ("longrope", "ntk"):
        yield f"model.rope.scaling.kind = {config.rope.scaling.kind}"
    if not family.unrotated and "N" in config.rope.pattern:
        yield f"model.rope.pattern = {config.rope.pattern}"


def _misfit_biases(config: ModelConfig, family: Family) -> Iterator[str]:
    bias = config.bias
    if family.biases == "every":
        yield from (f"model.bias.{name} = false" for name, there in bias if not there)
        return
    if family.biases in ("none", "qkv"):
        if bias.qkv != (family.biases == "qkv"):
            yield f"model.bias.qkv = {_shown(bias.qkv)}"
        if bias.attention_output:
            yield "model.bias.attention_output = true"
    elif bias.qkv != bias.attention_output:
        yield f"model.bias.qkv = {_shown(bias.qkv)} with attention_output = {_shown(bias.attention_output)}"
    if bias.mlp and family.biases != "all":
        yield "model.bias.mlp = true"


def value_of(config: ModelConfig, key: str) -> Any:
    """The value of a dotted key of the model section."""
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


def _shown(value: Any) -> str:
    """A value as YAML writes it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)
