"""Read the config.json of a Hugging Face model as a model section.

Every key is accounted for: it is read here, it is one of `IGNORED`, it is null (not set), or the model is refused with
the key's name, because it may change the mathematics. A key that old files leave out has the value that transformers
gives it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from pretune.core.config import ConfigError, InputError, validate
from pretune.model.config import GATED, ModelConfig
from pretune.model.huggingface.architectures import (
    ACTIVATIONS,
    APERTUS,
    ARCEE,
    LLAMA,
    MISTRAL,
    NANOCHAT,
    PHI3,
    QWEN2,
    QWEN3,
    SMOLLM3,
    Architecture,
)
from pretune.model.huggingface.keys import REQUIRED, Keys
from pretune.model.huggingface.rope_keys import max_length, read_rope

IGNORED = frozenset({
    "_name_or_path", "name_or_path", "transformers_version", "auto_map", "dtype", "torch_dtype", "use_cache",
    "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
    "cls_token_id", "decoder_start_token_id", "attention_dropout", "resid_pdrop", "embd_pdrop",
    "pretraining_tp", "is_llama_config",
    "transformers.js_config", "id2label", "label2id", "problem_type", "task_specific_params",
    "output_attentions", "output_hidden_states", "return_dict", "return_dict_in_generate",
    "chunk_size_feed_forward", "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p",
    "_attn_implementation", "attn_implementation", "unsloth_fixed", "unsloth_version"
})  # fmt: skip
"""Keys that say how a model is stored, trained, run or ended, not what it computes: the stored tensors tell their own
dtype, dropout is a choice of training (model.dropout), generation has a section of its own, and pretraining_tp only
splits matrix products. auto_map names code that a model brings along, which is never run."""

_ALIASES = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}
"""Other names of transformers' for the same activation."""

_NEUTRAL: dict[str, Any] = {"rope_interleaved": False, "is_decoder": False, "add_cross_attention": False}
"""Keys whose other values would change the mathematics."""


class Family(NamedTuple):
    """What the name of an architecture says beyond the keys of its config.json."""

    kind: Architecture
    gated: bool = True
    biases: str = "keys"
    """keys (attention_bias, mlp_bias), none, or qkv."""
    windows: str = "none"
    """none, off (there are keys, which must say none), all (every layer has sliding_window) or layers
    (use_sliding_window, max_window_layers, layer_types)."""
    qk_norm: bool = False
    grouped: bool = True
    """Whether num_key_value_heads must be given; else it is num_attention_heads, as in files older than the key."""
    tied: bool = False
    """Whether the head is tied to the embedding where tie_word_embeddings is left out."""
    theta: float | None = None
    """Base of the rotary frequencies where neither spelling gives one; None: it must be given."""


FAMILIES = {
    family.kind.model_type: family
    for family in (
        Family(LLAMA, grouped=False, theta=10000.0),  # the files of Llama 1 and 2 do not say it
        Family(MISTRAL, biases="none", windows="all"),
        Family(QWEN2, biases="qkv", windows="layers"),
        Family(QWEN3, windows="layers", qk_norm=True),
        Family(SMOLLM3, windows="off", tied=True),
        Family(PHI3, biases="none", windows="all", grouped=False),
        Family(ARCEE, grouped=False, gated=False),
        Family(APERTUS, grouped=False, gated=False, qk_norm=True),
        Family(NANOCHAT, grouped=False, gated=False, biases="none", qk_norm=True),
    )
}


def read_config(folder: Path) -> tuple[Architecture, ModelConfig]:
    """The architecture and the model section of a folder's config.json.

    Weights that are not there (`init`) and dropout get plain values; the vocabulary is padded to a multiple of 64.
    Raises InputError, naming the file and the key, for a file that cannot be read, an architecture that is not known,
    and a value that the model cannot have.
    """
    path = folder / "config.json"
    content = _read_json(path)
    name = content.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(
            f"{path}: model_type = {json.dumps(name)} is none of the architectures that can be read: "
            f"{', '.join(FAMILIES)}"
        )
    family, keys = FAMILIES[name], Keys(content, path)
    keys.must_be("model_type", name)
    _check_class(keys, family.kind)
    section = _section(keys, family)
    for key, value in _NEUTRAL.items():
        keys.must_be(key, value, default=value)
    keys.refuse_rest(IGNORED)
    try:
        return family.kind, validate(ModelConfig, section)
    except ConfigError as error:
        raise InputError(f"{path}: as a model section, {'; '.join(str(error).splitlines())}") from None


def _read_json(path: Path) -> dict[str, Any]:
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


def _check_class(keys: Keys, kind: Architecture) -> None:
    known = {kind.name, kind.name.replace("ForCausalLM", "Model")}
    found = keys.take("architectures", list, default=None)
    if found and not known.intersection(str(one) for one in found):
        raise InputError(f"{keys.path}: architectures = {found} is not a language model; {kind.name} can be read")


def _section(keys: Keys, family: Family) -> dict[str, Any]:
    dim, num_heads = keys.take("hidden_size", int), keys.take("num_attention_heads", int)
    if num_heads < 1:
        raise InputError(f"{keys.path}: num_attention_heads = {num_heads} must be at least 1")
    num_layers, length = keys.take("num_hidden_layers", int), keys.take("max_position_embeddings", int)
    if not 1 <= num_layers <= 1000:
        raise InputError(f"{keys.path}: num_hidden_layers = {num_layers} must be from 1 to 1000")
    bare = family.kind is NANOCHAT
    std, rope = keys.content.get("initializer_range"), read_rope(keys, family.theta, length, family.kind is PHI3)
    head_dim = keys.take("head_dim", int, default=128 if family.kind is QWEN3 else None) or dim // num_heads
    if int(head_dim * rope["fraction"]) % 2:
        raise InputError(f"{keys.path}: partial_rotary_factor = {rope['fraction']} rotates an odd number of components")
    return {
        "num_layers": num_layers,
        "dim": dim,
        "num_heads": num_heads,
        "num_kv_heads": keys.take("num_key_value_heads", int, REQUIRED if family.grouped else None, none=True)
        or num_heads,
        "head_dim": head_dim,
        "mlp_dim": keys.take("intermediate_size", int),
        "vocab_size": keys.take("vocab_size", int),
        "vocab_multiple_of": 64,
        "max_sequence_length": max_length(rope["scaling"], length),
        "activation": _activation(keys, family.gated),
        "norm": {"kind": "rmsnorm", "learned": not bare, "eps": keys.take("rms_norm_eps", float)},
        "qk_norm": family.qk_norm,
        "attention_scale": 1.0,
        "window": _window(keys, family, num_layers),
        "value_embeddings": False,
        "residual_scalars": False,
        "normalize_embedding": bare,
        "bias": _biases(keys, family),
        "tied_embeddings": keys.take("tie_word_embeddings", bool, default=family.tied),
        "dropout": 0.0,
        "softcap": keys.take("final_logit_softcapping", float, default=15.0, none=True) if bare else None,
        "init": dict.fromkeys(("std", "embedding_std", "head_std"), std or 0.02) | {"output": "plain"},
        "rope": rope | ({"pattern": _rotated_layers(keys, num_layers)} if family.kind is SMOLLM3 else {}),
    }


def _activation(keys: Keys, gated: bool) -> str:
    given: str = keys.take("hidden_act", str)
    name = _ALIASES.get(given, given)
    known: dict[str, str] = {theirs: ours for ours, theirs in ACTIVATIONS.items() if (ours in GATED) == gated}
    if name not in known:
        raise InputError(
            f"{keys.path}: hidden_act = {given} is not known for this architecture; {', '.join(known)} are"
        )
    return known[name]


def _biases(keys: Keys, family: Family) -> dict[str, bool]:
    if family.biases == "none":
        keys.must_be("attention_bias", False, default=False)
        return {"qkv": False, "attention_output": False, "mlp": False}
    if family.biases == "qkv":
        return {"qkv": True, "attention_output": False, "mlp": False}
    attention = keys.take("attention_bias", bool, default=False)
    mlp = family.kind in (LLAMA, SMOLLM3, ARCEE) and keys.take("mlp_bias", bool, default=False)
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


def _window(keys: Keys, family: Family, num_layers: int) -> dict[str, Any] | None:
    """A window of n is, as in transformers, the token itself and the n - 1 before it."""
    windows = family.windows
    if windows == "none":
        return None
    if windows == "off":
        keys.must_be("use_sliding_window", False, default=False)
        keys.take("sliding_window", int, default=None)
        if set(map(str, keys.take("layer_types", list, default=[]))) - {"full_attention"}:
            raise InputError(f"{keys.path}: layer_types must be full_attention in every layer")
        return None
    size = keys.take("sliding_window", int, default=None if family.kind is PHI3 else 4096, none=True)
    if windows == "all":
        return None if size is None else {"size": size, "pattern": "S", "full_last_layer": False}
    used = keys.take("use_sliding_window", bool, default=False) and size is not None
    first, types = keys.take("max_window_layers", int, default=28), keys.take("layer_types", list, default=None)
    if types is None:
        types = ["sliding_attention" if used and layer >= first else "full_attention" for layer in range(num_layers)]
    letters = {"sliding_attention": "S", "full_attention": "L"}
    if len(types) != num_layers or any(str(one) not in letters for one in types):
        raise InputError(f"{keys.path}: layer_types must be {num_layers} times full_attention or sliding_attention")
    if "sliding_attention" in types and not used:
        raise InputError(f"{keys.path}: layer_types has sliding_attention, but use_sliding_window or sliding_window no")
    pattern = "".join(letters[one] for one in types)
    return {"size": size, "pattern": pattern, "full_last_layer": False} if "S" in pattern else None
