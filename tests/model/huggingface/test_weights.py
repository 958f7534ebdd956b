"""The model against transformers' Llama, Qwen2 and Qwen3 with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny import imported, tiny_config, tiny_model, transformers_shape

from pretune.core.config import ConfigError, InputError
from pretune.model.huggingface.weights import load_huggingface, to_huggingface
from pretune.model.transformer import Transformer

QWEN2 = {"architecture": "qwen2", "bias": {"qkv": True, "attention_output": False, "mlp": False}}
ALL_BIASES = {"qkv": True, "attention_output": True, "mlp": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_grouped_wide_heads": (
        "Llama",
        {"num_kv_heads": 2, "head_dim": 16, "rope": {"theta": 5e5, "fraction": 1.0, "scaling": None, "pattern": "R"}},
    ),
    "llama_untied_biases": ("Llama", {"tied_embeddings": False, "bias": ALL_BIASES, "num_kv_heads": 1}),
    "qwen2": ("Qwen2", {"num_kv_heads": 2, **QWEN2}),
    "qwen3": ("Qwen3", {"num_kv_heads": 2, "head_dim": 16, "qk_norm": True, "tied_embeddings": False}),
}


def theirs(kind: str, changes: dict[str, Any]) -> Any:
    config = tiny_config(**changes)
    shape = {**transformers_shape(config), "initializer_range": 0.2}
    if kind == "Llama":
        shape |= {"attention_bias": config.bias.qkv, "mlp_bias": config.bias.mlp}
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**shape))
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms start at one and biases at zero, which would hide many mistakes
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    return model.float().train()


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(case: str) -> None:
    kind, changes = CASES[case]
    reference, config = theirs(kind, changes), tiny_config(**changes)
    model = Transformer(config)
    load_huggingface(reference.state_dict(), model)
    tokens = torch.randint(0, config.vocab_size, (3, 33), generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    logits, wanted = model.unembed(model(inputs)), reference(inputs).logits
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())

    for output in (logits, wanted):
        F.cross_entropy(output.flatten(0, 1), targets.flatten()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    converted = to_huggingface(gradients, config)
    references = {name: p.grad for name, p in reference.named_parameters()}
    assert converted.keys() == references.keys()
    for name, gradient in converted.items():
        scale = references[name].abs().max().item()
        torch.testing.assert_close(
            gradient, references[name], rtol=0, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("changes", [changes for _, changes in CASES.values()], ids=CASES)
def test_round_trip(changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    ours = model.state_dict()
    back = imported(to_huggingface(ours, model.config), model.config).state_dict()
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)


def test_padding_rows_are_dropped_and_come_back_as_zeros() -> None:
    model = tiny_model(vocab_multiple_of=64, tied_embeddings=False)
    hub = to_huggingface(model.state_dict(), model.config)
    assert hub["model.embed_tokens.weight"].shape[0] == hub["lm_head.weight"].shape[0] == 61
    ours = imported(hub, model.config).state_dict()
    for name in ("embedding.weight", "head.weight"):
        assert torch.equal(ours[name][:61], model.state_dict()[name][:61])
        assert ours[name].shape[0] == 64
        assert not ours[name][61:].any()


def test_weights_that_do_not_fit_are_named() -> None:
    hub = to_huggingface(tiny_model(**QWEN2).state_dict(), tiny_config(**QWEN2))
    with pytest.raises(InputError, match=r"no place for, such as 'model.layers.0.self_attn.q_proj.bias'"):
        imported(hub, tiny_config())
    with pytest.raises(InputError, match=r"no weight 'model.layers.2.input_layernorm.weight'"):
        imported(hub, tiny_config(**QWEN2, num_layers=3))
    with pytest.raises(InputError, match=r"'model.layers.0.mlp.gate_proj.weight' has shape \[48, 32\].*\[40, 32\]"):
        imported(hub, tiny_config(**QWEN2, mlp_dim=40))
    with pytest.raises(ConfigError, match="softcap"):
        to_huggingface(tiny_model(softcap=15.0).state_dict(), tiny_config(softcap=15.0))
