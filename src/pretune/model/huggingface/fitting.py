"""Choose the family of transformers that computes what a model computes, and check one that is given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pretune.core.config import ConfigError
from pretune.model.config import GATED, ModelConfig
from pretune.model.huggingface.families import APERTUS, ARCEE, FAMILIES, GPT2, LLAMA, NANOCHAT, QWEN3, Family


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
    if query_scalar(config, family) is None:
        yield f"model.attention_scale = {config.attention_scale}"
    if (config.rope.local_theta is None) != (family.local_theta is None):
        yield f"model.rope.local_theta = {_shown(config.rope.local_theta)}"
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


def query_scalar(config: ModelConfig, family: Family) -> int | None:
    """The number by whose root the family divides queries, head_dim if it has no key for it; None if there is none."""
    exact = config.head_dim / config.attention_scale**2
    number = round(exact)
    if abs(number - exact) > 1e-6 * exact or (family.query_scalar is None and number != config.head_dim):
        return None
    return number


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
