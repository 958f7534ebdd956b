"""Read the config.json of a Hugging Face model as a model section, and write it.

Every key is accounted for: it is read here, it is one of `IGNORED`, it is null (not set), or the model is refused with
the key's name, because it may change the mathematics. A key that old files leave out has the value that transformers
gives it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pretune.core.config import ConfigError, InputError, validate
from pretune.model.config import GATED, ModelConfig
from pretune.model.huggingface.families import FAMILIES, GPT2, Family
from pretune.model.huggingface.fitting import family_of, query_scalar, value_of
from pretune.model.huggingface.gpt2_keys import GPT2_IGNORED, read_gpt2, written_gpt2
from pretune.model.huggingface.keys import REQUIRED, Keys, NotHeld
from pretune.model.huggingface.rope_keys import max_length, read_rope, take_local_theta, written_rope
from pretune.model.huggingface.window_keys import read_window, written_window

IGNORED = frozenset({
    "_name_or_path", "name_or_path", "transformers_version", "auto_map", "dtype", "torch_dtype", "use_cache",
    "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
    "cls_token_id", "decoder_start_token_id", "attention_dropout", "resid_pdrop", "embd_pdrop",
    "pretraining_tp", "is_llama_config",
    "transformers.js_config", "id2label", "label2id", "problem_type", "task_specific_params",
    "output_attentions", "output_hidden_states", "return_dict", "return_dict_in_generate",
    "chunk_size_feed_forward", "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p",
    "_attn_implementation", "attn_implementation", "unsloth_fixed", "unsloth_version",
    "cache_implementation", "_sliding_window_pattern"
})  # fmt: skip
"""Keys that say how a model is stored, trained, run or ended, not what it computes: the stored tensors tell their own
dtype, dropout is a choice of training (model.dropout), generation has a section of its own, and pretraining_tp only
splits matrix products. auto_map names code that a model brings along, which is never run."""

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

_ALIASES = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}
"""Other names of transformers' for the same activation."""

_NEUTRAL: dict[str, Any] = {
    "rope_interleaved": False,
    "use_mrope": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "use_bidirectional_attention": False,
}
"""Keys whose other values would change the mathematics."""


def read_config(folder: Path) -> ModelConfig:
    """The model section of a folder's config.json.

    Weights that are not there (`init`) and dropout get plain values; the vocabulary is padded to a multiple of 64.
    Raises InputError, naming the file and the key, for a file that cannot be read, an architecture that is not known,
    and a value that the model cannot have.
    """
    path = folder / "config.json"
    content = read_json(path)
    name = content.get("model_type")
    if isinstance(content.get("text_config"), dict):
        raise InputError(
            f"{path}: model_type = {json.dumps(name)} reads more than text. Save its language model on its own, with "
            "transformers, and give that folder"
        )
    if not isinstance(name, str) or name not in FAMILIES:
        raise NotHeld(
            f"{path}: model_type = {json.dumps(name)} is none of the architectures that can be read: "
            f"{', '.join(FAMILIES)}"
        )
    family, keys = FAMILIES[name], Keys(content, path)
    keys.must_be("model_type", name)
    _check_class(keys, family)
    section = read_gpt2(keys, _activation(keys, family)) if family is GPT2 else _section(keys, family)
    section |= _common(keys, family)
    for ours, (theirs, default) in family.numbers.items():
        _put(section, ours, keys.take(theirs, float, default=default, none=True))
    for ours, value in family.fixed().items():
        _put(section, ours, value)
    for key, value in _NEUTRAL.items():
        keys.must_be(key, value, default=value)
    keys.refuse_rest(IGNORED | GPT2_IGNORED if family is GPT2 else IGNORED)
    try:
        return validate(ModelConfig, section)
    except ConfigError as error:
        raise NotHeld(f"{path}: as a model section, {'; '.join(str(error).splitlines())}") from None


def huggingface_config(config: ModelConfig, eos_id: int, dtype: str) -> dict[str, Any]:
    """The content of config.json for weights from `to_huggingface`, stored as `dtype`. ConfigError: see family_of."""
    family = family_of(config)
    shape = written_gpt2(config, ACTIVATIONS[config.activation]) if family is GPT2 else _written(config, family)
    return {
        "architectures": [family.name],
        "model_type": family.model_type,
        **shape,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": config.init.std,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "use_cache": True,
        "dtype": dtype,
    }


def _written(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The shape, by the keys of every family but GPT-2."""
    bias = config.bias
    content = {
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.mlp_dim,
        family.activation[0]: ACTIVATIONS[config.activation],
        **written_rope(config),
        **written_window(config, family),
        "rms_norm_eps": config.norm.eps,
        "attention_dropout": 0.0,
    }
    if family.says_head_dim or config.head_dim * config.num_heads != config.dim:
        content["head_dim"] = config.head_dim
    if family.biases in ("attention", "all"):
        content["attention_bias"] = bias.qkv
    if family.biases == "all":
        content["mlp_bias"] = bias.mlp
    if family.unrotated:
        content["no_rope_layers"] = [int(config.is_rotated(layer)) for layer in range(config.num_layers)]
    if family.query_scalar is not None:
        content["query_pre_attn_scalar"] = query_scalar(config, family)
    return content | {theirs: value_of(config, ours) for ours, (theirs, _) in family.numbers.items()}


def read_json(path: Path) -> dict[str, Any]:
    """The content of a config.json; InputError, naming it, where there is none or it is no JSON object."""
    if not path.parent.is_dir():
        raise InputError(f"no folder {path.parent}; give the folder of a Hugging Face model")
    if not path.is_file():
        raise InputError(f"{path.parent} has no config.json, so it is not the folder of a Hugging Face model")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object; download it again")
    return content


def _check_class(keys: Keys, family: Family) -> None:
    stem = family.name.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    known = {family.name, f"{stem}Model", f"{stem}TextModel"}
    found = keys.take("architectures", list, default=None)
    if found and not known.intersection(str(one) for one in found):
        raise InputError(f"{keys.path}: architectures = {found} is not a language model; {family.name} can be read")


def _section(keys: Keys, family: Family) -> dict[str, Any]:
    dim, num_heads = keys.take("hidden_size", int), keys.take("num_attention_heads", int)
    if num_heads < 1:
        raise InputError(f"{keys.path}: num_attention_heads = {num_heads} must be at least 1")
    num_layers, length = keys.take("num_hidden_layers", int), keys.take("max_position_embeddings", int)
    if not 1 <= num_layers <= 1000:
        raise InputError(f"{keys.path}: num_hidden_layers = {num_layers} must be from 1 to 1000")
    local_theta = None if family.local_theta is None else take_local_theta(keys, family.local_theta)
    rope = read_rope(keys, family.theta, length, family.longrope)
    head_dim = keys.take("head_dim", int, default=family.head_dim) or dim // num_heads
    if int(head_dim * rope["fraction"]) % 2:
        raise NotHeld(f"{keys.path}: partial_rotary_factor = {rope['fraction']} rotates an odd number of components")
    section: dict[str, Any] = {
        "num_layers": num_layers,
        "dim": dim,
        "num_heads": num_heads,
        "num_kv_heads": keys.take("num_key_value_heads", int, REQUIRED if family.grouped else None, none=True)
        or num_heads,
        "head_dim": head_dim,
        "mlp_dim": keys.take("intermediate_size", int),
        "max_sequence_length": max_length(rope["scaling"], length),
        "activation": _activation(keys, family),
        "attention_scale": _attention_scale(keys, family, head_dim),
        "norm": {"eps": keys.take("rms_norm_eps", float)},
        "window": read_window(keys, family, num_layers),
        "bias": _biases(keys, family),
        "rope": rope | {"local_theta": local_theta},
    }
    if family.unrotated:
        section["rope"]["pattern"] = _rotated_layers(keys, num_layers)
    return section


def _common(keys: Keys, family: Family) -> dict[str, Any]:
    """The keys that every family has by the same names."""
    std = keys.content.get("initializer_range") or 0.02
    return {
        "architecture": family.model_type,
        "vocab_size": keys.take("vocab_size", int),
        "vocab_multiple_of": 64,
        "tied_embeddings": keys.take("tie_word_embeddings", bool, default=family.tied),
        "dropout": 0.0,
        "init": dict.fromkeys(("std", "embedding_std", "head_std"), std) | {"output": "plain"},
    }


def _put(section: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of a section."""
    *outer, last = key.split(".")
    for name in outer:
        section = section[name]
    section[last] = value


def _activation(keys: Keys, family: Family) -> str:
    key, default = family.activation
    given: str = keys.take(key, str, default=REQUIRED if default is None else default)
    aliases = _ALIASES | ({"gelu": "gelu_pytorch_tanh"} if family.model_type == "gemma" else {})  # as transformers does
    name = aliases.get(given, given)
    known: dict[str, str] = {theirs: ours for ours, theirs in ACTIVATIONS.items() if (ours in GATED) == family.gated}
    if name not in known:
        raise NotHeld(f"{keys.path}: {key} = {given} is not known for this architecture; {', '.join(known)} are")
    if family.model_type.startswith("gemma"):
        # Its files have had either key, with a gelu that always meant the tanh approximation.
        other = "hidden_act" if key == "hidden_activation" else "hidden_activation"
        if keys.take(other, str, default=name) not in (name, "gelu"):
            raise InputError(f"{keys.path}: hidden_act and hidden_activation contradict each other; keep {key}")
    return known[name]


def _attention_scale(keys: Keys, family: Family, head_dim: int) -> float:
    if family.query_scalar is None:
        return 1.0
    scalar = keys.take("query_pre_attn_scalar", int, default=family.query_scalar)
    if scalar < 1:
        raise InputError(f"{keys.path}: query_pre_attn_scalar = {scalar} must be at least 1")
    return float((head_dim / scalar) ** 0.5)


def _biases(keys: Keys, family: Family) -> dict[str, bool]:
    if family.biases == "none":
        keys.must_be("attention_bias", False, default=False)
        return {"qkv": False, "attention_output": False, "mlp": False}
    if family.biases == "qkv":
        return {"qkv": True, "attention_output": False, "mlp": False}
    attention = keys.take("attention_bias", bool, default=False)
    mlp = family.biases == "all" and keys.take("mlp_bias", bool, default=False)
    return {"qkv": attention, "attention_output": attention, "mlp": mlp}


def _rotated_layers(keys: Keys, num_layers: int) -> str:
    """The pattern of layers that are rotated: whatever its name says, a 1 in no_rope_layers means rotated."""
    every = keys.take("no_rope_layer_interval", int, default=4)
    rotated = keys.take("no_rope_layers", list, default=None)
    if rotated is None:
        rotated = [int(every < 1 or layer % every != 0) for layer in range(1, num_layers + 1)]
    if len(rotated) < num_layers or any(one not in (0, 1) for one in rotated):
        raise InputError(f"{keys.path}: no_rope_layers must have a 0 or 1 for each of {num_layers} layers (1: rotated)")
    return "".join("R" if one else "N" for one in rotated[:num_layers])
