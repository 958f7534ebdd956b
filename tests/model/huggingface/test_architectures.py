"""Exported models in transformers: the loaded model computes what ours computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tiny import GPT2, SCALINGS, stretched, tiny_config, tiny_model

from pretune.core.config import ConfigError
from pretune.model.huggingface.config_json import huggingface_config
from pretune.model.huggingface.fitting import family_of
from pretune.model.huggingface.folding import portable_config, portable_weights
from pretune.model.huggingface.weights import load_huggingface, to_huggingface
from pretune.model.transformer import Transformer

NONE, QKV, ATTENTION, ALL = (
    {"qkv": qkv, "attention_output": output, "mlp": mlp}
    for qkv, output, mlp in ((False, False, False), (True, False, False), (True, True, False), (True, True, True))
)
BARE = {
    "activation": "relu_squared",
    "norm": {"kind": "rmsnorm", "eps": 1e-5, "learned": False},
    "qk_norm": True,
    "normalize_embedding": True,
    "tied_embeddings": False,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied": ("llama", {}),
    "llama grouped, wide heads, padded": ("llama", {"num_kv_heads": 2, "head_dim": 16, "vocab_multiple_of": 64}),
    "llama untied with biases": ("llama", {"tied_embeddings": False, "bias": ALL}),
    "llama geglu": ("llama", {"activation": "geglu"}),
    "llama reglu": (
        "llama",
        {"activation": "reglu", "rope": {"theta": 5e5, "fraction": 1.0, "scaling": None, "pattern": "R"}},
    ),
    **{f"llama {rule}": ("llama", {"rope": stretched(rule)}) for rule in SCALINGS},
    "biases as in qwen2": ("llama", {"bias": QKV, "num_kv_heads": 2}),
    "biases of the output alone": ("llama", {"bias": {"qkv": False, "attention_output": True, "mlp": True}}),
    "qwen3": ("qwen3", {"qk_norm": True, "head_dim": 16, "tied_embeddings": False}),
    "qwen3 with biases": ("qwen3", {"qk_norm": True, "bias": ATTENTION}),
    "qwen3 with some biases": ("qwen3", {"qk_norm": True, "bias": QKV}),
    "arcee relu squared": ("arcee", {"activation": "relu_squared", "tied_embeddings": False}),
    "arcee gelu with biases": ("arcee", {"activation": "gelu", "bias": ALL, "num_kv_heads": 1}),
    "arcee with some biases": ("arcee", {"activation": "relu_squared", "bias": QKV}),
    "apertus relu squared": ("apertus", {"activation": "relu_squared", "qk_norm": True, "tied_embeddings": False}),
    "gpt2": ("gpt2", GPT2),
    "gpt2 untied, narrow, padded": ("gpt2", {**GPT2, "tied_embeddings": False, "mlp_dim": 48, "vocab_multiple_of": 64}),
    "nanochat": ("nanochat", {**BARE, "softcap": 15.0, "num_kv_heads": 2, "vocab_multiple_of": 64}),
    "nanochat gelu, wide heads": ("nanochat", {**BARE, "softcap": 4.0, "activation": "gelu", "head_dim": 16}),
    "bare norms": ("apertus", BARE),
    "bare norms, tied, a scale": ("apertus", {**BARE, "tied_embeddings": True, "attention_scale": 1.44}),
    "normalized embedding": ("llama", {"normalize_embedding": True}),
    "scaled attention": ("llama", {"attention_scale": 0.7, "bias": QKV}),
    "scaled queries": ("qwen3", {"attention_scale": 1.2, "qk_norm": True}),
    "apertus silu with biases": ("apertus", {"activation": "silu", "qk_norm": True, "bias": ATTENTION}),
}


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_it_and_its_logits_are_ours(case: str, tmp_path: Path) -> None:
    kind, changes = CASES[case]
    model = tiny_model(**changes).eval()
    shape = portable_config(model.config)
    theirs = to_huggingface(portable_weights(model.state_dict(), model.config), shape)
    save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, tmp_path / "model.safetensors")
    content = huggingface_config(shape, eos_id=0, dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps(content))
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert loaded.config.model_type == kind
    assert not any(report.values()), report
    assert getattr(loaded.config, "head_dim", 8) == model.config.head_dim
    tokens = torch.randint(0, 61, (3, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model.unembed(model(tokens))
        torch.testing.assert_close(loaded.eval()(tokens).logits, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("case", CASES)
def test_a_portable_model_computes_the_same_here_too(case: str) -> None:
    model = tiny_model(**CASES[case][1] | {"vocab_multiple_of": 1})
    shape = portable_config(model.config)
    same = Transformer(shape)
    weights = portable_weights(model.state_dict(), model.config)
    load_huggingface(to_huggingface(weights, shape), same)
    tokens = torch.arange(32)[None]
    torch.testing.assert_close(same.unembed(same(tokens)), model.unembed(model(tokens)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"softcap": 15.0}, r"model\.softcap = 15"),
        ({"norm": {"kind": "layernorm", "eps": 1e-5, "learned": True}}, r"model\.norm\.kind = layernorm"),
        ({"rope": {"theta": 1e4, "fraction": 0.5, "scaling": None, "pattern": "R"}}, r"model\.rope\.fraction = 0\.5"),
        ({"rope": {"theta": 1e4, "fraction": 1.0, "scaling": None, "pattern": "RN"}}, r"model\.rope\.pattern = RN"),
        ({"bias": ALL, "qk_norm": True}, r"model\.bias\.mlp"),
        ({"window": {"size": 8, "pattern": "SL", "full_last_layer": True}}, r"model\.window"),
        (
            {"learned_positions": True},
            r"norm\.kind = rmsnorm; model\.rope.* = 1\.0; .*bias\.mlp = false",
        ),
        ({**GPT2, "num_kv_heads": 2, "softcap": 5.0}, r"softcap = 5\.0; model\.num_kv_heads = 2"),
        ({"value_embeddings": True}, r"model\.value_embeddings"),
        ({"residual_scalars": True}, r"model\.residual_scalars"),
        ({**BARE, "softcap": 15.0, "attention_scale": 1.2}, r"model\.attention_scale = 1.2"),
        (
            {"softcap": 15.0, "rope": {"theta": 1e4, "fraction": 0.0, "scaling": None, "pattern": "R"}},
            r"softcap = 15.0; model\.rope",
        ),
    ],
)
def test_what_no_architecture_has_is_named(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        family_of(portable_config(tiny_config(**changes)))


@pytest.mark.parametrize(
    ("family", "changes", "keys"),
    [
        ("qwen2", {"bias": ALL}, r"model\.bias\.attention_output = true; model\.bias\.mlp = true"),
        ("qwen2", {}, r"model\.bias\.qkv = false"),
        ("mistral", {"bias": ATTENTION}, r"model\.bias\.qkv = true; model\.bias\.attention_output = true"),
        ("mistral", {"window": {"size": 8, "pattern": "SL", "full_last_layer": False}}, r"model\.window\.pattern = SL"),
        ("llama", {"window": {"size": 8, "pattern": "S", "full_last_layer": False}}, r"model\.window\.pattern = S"),
        ("llama", {"qk_norm": True, "attention_scale": 1.2}, r"model\.qk_norm = true; model\.attention_scale = 1\.2"),
        ("llama", {"bias": QKV}, r"model\.bias\.qkv = true with attention_output = false"),
        ("arcee", {}, r"model\.activation = swiglu"),
        ("qwen3", {"qk_norm": True, "softcap": 5.0}, r"model\.softcap = 5\.0"),
        ("nanochat", {**BARE, "bias": QKV}, r"model\.bias\.qkv = true"),
    ],
)
def test_an_architecture_that_the_model_contradicts_is_named_with_the_keys(
    family: str, changes: dict[str, Any], keys: str
) -> None:
    with pytest.raises(ConfigError, match=rf"model\.architecture = {family} contradicts {keys}: change"):
        family_of(tiny_config(architecture=family, **changes))


def test_a_model_of_the_users_own_is_exported_as_it_says(tmp_path: Path) -> None:
    model = tiny_model(architecture="mistral", window={"size": 5, "pattern": "S", "full_last_layer": False}).eval()
    save_file(to_huggingface(model.state_dict(), model.config), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(huggingface_config(model.config, 0, "float32")))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.sliding_window == 5
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(tokens).logits, model.unembed(model(tokens)), rtol=1e-4, atol=1e-4)


def test_every_architecture_of_the_configuration_is_a_family() -> None:
    from typing import get_args

    from pretune.model.config import Architecture
    from pretune.model.huggingface.families import FAMILIES

    assert tuple(FAMILIES) == get_args(Architecture)
