"""What the converter of llama.cpp finds beside transformers' files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import GPT2, stretched, tiny_config, tiny_model
from transformers.activations import XIELUActivation

from pretune.model.huggingface.folding import portable_config, portable_weights
from pretune.model.huggingface.llama_cpp import llama_cpp_tensors, obstacle
from pretune.model.huggingface.weights import to_huggingface

SQUARED = {"activation": "relu_squared", "qk_norm": True}


@pytest.mark.parametrize("tied", [True, False])
def test_an_apertus_computes_relu_squared_by_xielu(tied: bool) -> None:
    model = tiny_model(**SQUARED, tied_embeddings=tied)
    shape = portable_config(model.config)
    theirs = to_huggingface(portable_weights(model.state_dict(), model.config), shape)
    tensors = llama_cpp_tensors(shape, theirs)
    assert obstacle(shape) is None
    xielu = XIELUActivation(dtype=torch.float32)
    prefix = "model.layers.1.mlp.act_fn."
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    xielu.load_state_dict({name: tensor.view_as(xielu.state_dict()[name]) for name, tensor in found.items()})
    x = torch.cat((torch.linspace(-50, 50, 1001), torch.tensor([-1e-7, 0.0, 1e-7])))
    torch.testing.assert_close(xielu(x), F.relu(x).square(), rtol=1e-6, atol=0)
    assert ("lm_head.weight" in tensors) is tied
    assert not tied or torch.equal(tensors["lm_head.weight"], theirs["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"bias": {"qkv": True, "attention_output": False, "mlp": True}}, None),
        ({"qk_norm": True}, None),
        (GPT2, None),
        ({**GPT2, "mlp_dim": 48}, "four times model.dim"),
        ({**GPT2, "activation": "relu"}, "gelu in place of model.activation = relu"),
        ({"qk_norm": True, "rope": stretched("ntk")}, None),
        ({"rope": stretched("llama3")}, None),
        ({"rope": stretched("yarn")}, "not known to stretch positions as model.rope.scaling.kind = yarn"),
        ({"qk_norm": True, "rope": stretched("linear")}, "its qwen3 has no stretched positions"),
        ({"activation": "relu_squared"}, None),
        ({"activation": "geglu"}, "swiglu in place of model.activation = geglu"),
        ({"activation": "reglu", "qk_norm": True}, "swiglu in place of model.activation = reglu"),
        ({"activation": "gelu"}, "relu_squared in place of model.activation = gelu"),
        ({"activation": "silu", "qk_norm": True}, "relu_squared in place of model.activation = silu"),
        ({"activation": "relu_squared", "bias": {"qkv": True, "attention_output": True, "mlp": False}}, "no biases"),
        ({**SQUARED, "softcap": 15.0, "tied_embeddings": False, "normalize_embedding": True,
          "norm": {"kind": "rmsnorm", "eps": 1e-5, "learned": False}}, "no nanochat"),
    ],
)  # fmt: skip
def test_a_model_that_it_would_compute_wrongly_is_refused_by_name(changes: dict[str, Any], reason: str | None) -> None:
    shape = portable_config(tiny_config(**changes))
    found, tensors = obstacle(shape), llama_cpp_tensors(shape, {})
    if reason is None:
        assert found is None
        assert not tensors
    else:
        assert found is not None
        assert reason in found
        assert [name.partition(".")[0] for name in tensors] == ["not_for_llama_cpp"]
