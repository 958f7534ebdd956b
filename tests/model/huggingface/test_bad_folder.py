"""Folders and config.json files that cannot be read: one line that says what and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hub_models import FAMILIES, LLAMA3, LONGROPE, YARN, reference, reference_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import GPT2, SCALINGS, imported, stretched, tiny_model

from pretune.core.config import InputError
from pretune.model.config import ModelConfig
from pretune.model.huggingface.config_json import huggingface_config, read_config
from pretune.model.huggingface.families import FAMILIES as READ
from pretune.model.huggingface.folder import INDEX, WEIGHTS, open_folder
from pretune.model.huggingface.folding import portable_config, portable_weights
from pretune.model.huggingface.weights import load_huggingface, to_huggingface
from pretune.model.transformer import Transformer


def write(folder: Path, case: str, remove: tuple[str, ...] = (), **changes: Any) -> Path:
    reference(case).save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: content[key] for key in content if key not in remove}))
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found = open_folder(folder)
    return imported(found.tensors, found.config).state_dict()


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        weights_of(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("llama", {"model_type": "mamba"}, 'model_type = "mamba" is none of'),
        ("llama", {"model_type": ["llama"]}, "model_type"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "is not a language model"),
        ("llama", {"sliding_window": 4}, "sliding_window is not known for llama and may change what"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved = true cannot be computed"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "unquantized"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = gelu is not known"),
        ("apertus", {"hidden_act": "xielu"}, "hidden_act = xielu is not known"),
        ("llama", {"hidden_size": "32"}, 'hidden_size = "32" must be an integer'),
        ("llama", {"hidden_size": True}, "hidden_size = true must be an integer"),
        ("llama", {"num_hidden_layers": None}, "has no num_hidden_layers"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads = 0"),
        ("qwen2", {"num_hidden_layers": 2**50}, "must be from 1 to 1000"),
        ("llama", {"num_key_value_heads": 3}, "num_kv_heads"),
        ("llama", {"rope_theta": 1e4}, "contradict each other"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("llama", {"rope_parameters": {"rope_type": "spiral", "rope_theta": 5e5}}, "rope_type spiral is not known"),
        ("llama", {"rope_parameters": {"rope_theta": 5e5, "twist": 2}}, "twist is not known"),
        ("llama", {"rope_parameters": LLAMA3 | {"high_freq_factor": None}}, "has no high_freq_factor"),
        ("llama", {"rope_parameters": LLAMA3 | {"high_freq_factor": 0.5}}, "must exceed low_freq_factor"),
        ("llama", {"rope_parameters": LLAMA3, "rope_scaling": LLAMA3 | {"factor": 2.0}}, "contradict each other"),
        ("qwen3", {"rope_parameters": None}, "has no rope_theta"),
        ("qwen2 windows", {"layer_types": ["full_attention"]}, "layer_types must be 3 times"),
        ("qwen2 windows", {"use_sliding_window": False}, "layer_types has sliding_attention, but"),
        ("qwen2", {"intermediate_size": 50}, "'model.layers.0.mlp.gate_proj.weight' has shape [48, 32]"),
        ("llama", {"num_hidden_layers": 4}, "no weight 'model.layers.3."),
        ("llama", {"num_hidden_layers": 2}, "has no place for, such as 'model.layers.2."),
        ("gemma", {"hidden_act": "gelu", "hidden_activation": "relu"}, "hidden_act and hidden_activation contradict"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation = gelu is not known for this architecture"),
        ("gemma2", {"sliding_window": None}, "layer_types has sliding_attention, but"),
        ("gemma2", {"sliding_window_pattern": 3}, "sliding_window_pattern is not known for gemma2"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0 must be at least 1"),
        ("gemma2", {"attn_logit_softcapping": -2.0}, "attention_softcap"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = true cannot be computed"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not known for gemma3_text"),
        ("gemma3", {"rope_local_base_freq": 60.0}, "rope_parameters and rope_local_base_freq contradict each other"),
        ("gemma3", {"rope_parameters": {"rope_theta": 1e4}}, "must have sliding_attention and full_attention"),
        ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}}, 'rope_type = "linear" cannot'),
        ("gemma3", {"model_type": "gemma3", "text_config": {}, "vision_config": {}}, "reads more than text"),
        ("gemma3", {"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern = 0 must be"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv is not known for olmo2"),
        ("olmo2", {"num_key_value_heads": 4}, "'model.layers.0.self_attn.k_norm.weight' has shape [16]"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers must have a 0 or 1 for each of 3 layers"),
        ("smollm3", {"use_sliding_window": True}, "use_sliding_window = true cannot be computed"),
        (
            "phi3",
            {"rope_parameters": {"type": "longrope", "rope_theta": 1e4, "short_factor": [1.0]}},
            "has no long_factor",
        ),
        ("phi3 longrope", {"rope_parameters": LONGROPE | {"long_factor": [2.0]}}, "long_factor has 1 numbers"),
        ("phi3 longrope", {"rope_parameters": LONGROPE | {"short_factor": [1.0, "x"]}}, "short_factor"),
        ("phi3 longrope", {"rope_parameters": LONGROPE | {"long_mscale": 1.2}}, "long_mscale is not known"),
        ("phi3 longrope", {"partial_rotary_factor": 0.25}, "contradict each other"),
        ("phi3 partial", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.4}}, "an odd number"),
        ("qwen2.5 yarn", {"rope_parameters": YARN | {"factor": None}}, "has no factor"),
        ("qwen2.5 yarn", {"rope_parameters": YARN | {"beta_fast": 0.5}}, "must exceed beta_slow"),
        ("llama dynamic", {"rope_parameters": {"type": "dynamic", "rope_theta": 1e4}}, "has no factor"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights = false cannot be computed"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = true cannot"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = true cannot"),
        ("gpt2", {"n_head": 5}, "n_embd = 32 must be a multiple of n_head = 5"),
        ("gpt2", {"activation_function": "silu_and_more"}, "activation_function = silu_and_more is not known"),
        ("gpt2", {"hidden_size": 32}, "hidden_size is not known for gpt2"),
        ("gpt2", {"n_inner": 64}, "'transformer.h.0.mlp.c_fc.weight' has shape [32, 128]"),
        ("gpt2", {"n_positions": 64}, "'transformer.wpe.weight' has shape [96, 32]"),
        ("mistral 0.3", {"num_key_value_heads": 4}, "'model.layers.0.self_attn.k_proj.weight' has shape [32, 32]"),
        ("qwen2", {"tie_word_embeddings": False}, "no weight 'lm_head.weight'"),
    ],
)
def test_a_config_that_cannot_be_computed_is_named(
    case: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert message in refused(write(tmp_path, case, **changes))


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    assert "no folder" in refused(tmp_path / "nothing")
    assert "no config.json" in refused(tmp_path)
    write(tmp_path, "llama")
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:-100])
    assert WEIGHTS in refused(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "pytorch_model.bin")
    assert "a pickle" in refused(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    assert "no weights" in refused(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": 5}')
    assert "no readable weight_map" in refused(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    reference("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / INDEX).read_text())
    file = index["weight_map"]["lm_head.weight"]
    tensors = load_file(tmp_path / file)
    save_file({name: tensors[name] for name in tensors if name != "lm_head.weight"}, tmp_path / file)
    assert f"{file} has no lm_head.weight" in refused(tmp_path)
    (tmp_path / file).unlink()
    assert f"lacks {file}" in refused(tmp_path)
    index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert "lacks " in refused(tmp_path)


def test_quantized_weights_are_named(tmp_path: Path) -> None:
    write(tmp_path, "llama")
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, tmp_path / WEIGHTS)
    assert "'model.norm.weight' is torch.int8" in refused(tmp_path)


def test_both_spellings_of_stretched_positions_are_read_alike(tmp_path: Path) -> None:
    write(tmp_path, "llama 3.1")
    new = read_config(tmp_path)
    old = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    write(tmp_path, "llama 3.1", remove=("rope_parameters",), rope_theta=100.0, rope_scaling=old)
    assert read_config(tmp_path) == new
    named = {"type" if key == "rope_type" else key: value for key, value in old.items()}
    write(tmp_path, "llama 3.1", remove=("rope_parameters",), rope_theta=100.0, rope_scaling=named)
    assert read_config(tmp_path) == new
    assert new.rope.scaling is not None
    assert new.rope.scaling.kind == "llama3"


@pytest.mark.parametrize("family", [name for name in READ if name != "gpt2"])
def test_what_a_config_leaves_out_is_what_transformers_takes(family: str, tmp_path: Path) -> None:
    """Where a key with a default is removed, the reading is that of transformers' own configuration."""
    defaults = transformers.AutoConfig.for_model(family)
    needed = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size")
    values = {key: getattr(defaults, key) for key in needed} | {"rope_theta": 1e4}
    values |= {"max_position_embeddings": 64, "rms_norm_eps": 1e-6, "model_type": family}
    if READ[family].grouped:
        values["num_key_value_heads"] = 8
    if READ[family].activation[1] is None:
        values["hidden_act"] = "silu" if READ[family].gated else "relu2"
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = read_config(tmp_path)
    theirs = transformers.AutoConfig.for_model(**values)
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert config.tied_embeddings == theirs.tie_word_embeddings
    assert config.softcap == getattr(theirs, "final_logit_softcapping", None)
    assert (config.window and config.window.size) == getattr(theirs, "sliding_window", None)
    assert config.bias.qkv == getattr(theirs, "attention_bias", family == "qwen2")
    assert config.attention_softcap == getattr(theirs, "attn_logit_softcapping", None)
    scalar = getattr(theirs, "query_pre_attn_scalar", config.head_dim)
    assert config.attention_scale == pytest.approx((config.head_dim / scalar) ** 0.5)
    if getattr(theirs, "layer_types", None) is not None:
        windows = [config.window_of(layer) is not None for layer in range(config.num_layers)]
        assert windows == [kind == "sliding_attention" for kind in theirs.layer_types]
    local = theirs.rope_parameters.get("sliding_attention", {}).get("rope_theta")
    assert config.rope.local_theta == local


def test_gemma3_has_older_spellings(tmp_path: Path) -> None:
    write(tmp_path, "gemma3")
    new = read_config(tmp_path)
    old = {"rope_theta": 1e4, "rope_local_base_freq": 50.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    write(tmp_path, "gemma3", remove=("rope_parameters", "layer_types"), **old, sliding_window_pattern=3)
    assert read_config(tmp_path) == new
    write(tmp_path, "gemma", hidden_act="gelu", hidden_activation="gelu_pytorch_tanh")
    assert read_config(tmp_path).activation == "geglu"


def test_how_far_positions_are_stretched_is_known(tmp_path: Path) -> None:
    """Where max_position_embeddings is the original length, the factor says how many positions there are."""
    for case, length in {"llama dynamic": 128, "qwen2.5 yarn": 96, "phi3 longrope": 96, "llama 3.1": 96}.items():
        write(tmp_path, case)
        assert read_config(tmp_path).max_sequence_length == length
    write(tmp_path, "qwen2.5 yarn", max_position_embeddings=64)
    assert read_config(tmp_path).max_sequence_length == 64


def test_phi3_has_older_names_for_longrope(tmp_path: Path) -> None:
    write(tmp_path, "phi3 longrope")
    new = read_config(tmp_path)
    scaling = {"type": "su", "short_factor": LONGROPE["short_factor"], "long_factor": LONGROPE["long_factor"]}
    old = {"rope_scaling": scaling, "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    for name in ("su", "yarn", "longrope"):
        write(
            tmp_path, "phi3 longrope", remove=("rope_parameters",), **old | {"rope_scaling": scaling | {"type": name}}
        )
        assert read_config(tmp_path) == new


def test_what_a_gpt2_leaves_out_is_what_transformers_takes(tmp_path: Path) -> None:
    values = {"model_type": "gpt2", "n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 64, "vocab_size": 9}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = read_config(tmp_path)
    theirs = transformers.AutoConfig.for_model(**values)
    assert (config.dim, config.num_heads, config.max_sequence_length) == (24, 3, 64)
    assert (config.mlp_dim, config.activation, config.norm.eps) == (96, "gelu", theirs.layer_norm_epsilon)
    assert (config.tied_embeddings, theirs.activation_function) == (theirs.tie_word_embeddings, "gelu_new")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**40) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "rope_type", "x"]), inner),
    max_leaves=4,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(case=st.sampled_from(sorted(FAMILIES)), data=st.data())
def test_any_value_of_a_key_is_read_or_refused_in_one_line(case: str, data: st.DataObject, tmp_path: Path) -> None:
    content = reference_config(case).to_dict()
    key = data.draw(st.sampled_from(sorted(content)))
    (tmp_path / "config.json").write_text(json.dumps(content | {key: data.draw(JSON)}))
    try:
        outcome = read_config(tmp_path)
    except InputError as error:
        outcome = str(error)
    assert isinstance(outcome, ModelConfig) or ("\n" not in outcome and str(tmp_path) in outcome)


BARE = {"kind": "rmsnorm", "eps": 1e-5, "learned": False}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": True, "head_dim": 16},
        {"activation": "relu_squared", "qk_norm": True, "norm": BARE, "normalize_embedding": True},
        {"activation": "relu_squared", "bias": {"qkv": True, "attention_output": False, "mlp": False}},
        *({"rope": stretched(rule)} for rule in SCALINGS),
        GPT2,
        {**GPT2, "mlp_dim": 48, "tied_embeddings": False, "activation": "silu"},
        {"activation": "geglu", "tied_embeddings": False},
        {"activation": "gelu", "qk_norm": True, "norm": BARE, "normalize_embedding": True, "softcap": 9.0,
         "tied_embeddings": False},
    ],
)  # fmt: skip
def test_what_is_exported_comes_back(changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(**changes).eval()
    shape = portable_config(model.config)
    weights = to_huggingface(portable_weights(model.state_dict(), model.config), shape)
    save_file({name: one.contiguous() for name, one in weights.items()}, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps(huggingface_config(shape, 0, "float32")))
    found = open_folder(tmp_path)
    back, tokens = Transformer(found.config), torch.arange(32)[None]
    load_huggingface(found.tensors, back)
    torch.testing.assert_close(back.unembed(back(tokens)), model.unembed(model(tokens)), rtol=1e-4, atol=1e-4)
