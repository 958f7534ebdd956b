"""Architecture switches: their effect on the model, and that they are neutral where they should be."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_config, tiny_model
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from pretune.core.config import ConfigError
from pretune.model.costs import forward_flops, parameters_by_part, skeleton
from pretune.model.huggingface.weights import to_huggingface
from pretune.model.layers import Norm
from pretune.model.transformer import Transformer

TOKENS = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(0))


def with_weights_of(other: Transformer, **changes) -> Transformer:
    model = tiny_model(**changes)
    model.load_state_dict(other.state_dict(), strict=False)
    return model


def test_windows_are_those_of_transformers() -> None:
    shape = {"num_layers": 3, "qk_norm": True, "head_dim": 8}
    plain = tiny_model(**shape)
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=8,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            tie_word_embeddings=True,
            use_sliding_window=True,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
        )
    ).eval()
    theirs.load_state_dict(to_huggingface(plain.state_dict(), plain.config), strict=False)
    window = {"size": 5, "pattern": "SL", "full_last_layer": True}
    windowed = with_weights_of(plain, window=window, **shape)  # S, L, and the last layer is long
    with torch.no_grad():
        torch.testing.assert_close(windowed.unembed(windowed(TOKENS)), theirs(TOKENS).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(windowed(TOKENS)[:, 6:], plain(TOKENS)[:, 6:])


def test_attention_scale_is_the_scale_of_queries() -> None:
    plain = tiny_model(num_layers=1)
    sharper = with_weights_of(plain, num_layers=1, attention_scale=1.5)
    queries = plain.layers[0].attention.qkv.weight[:32]
    with torch.no_grad():
        queries.mul_(1.5)
    torch.testing.assert_close(sharper(TOKENS), plain(TOKENS))


def test_value_embeddings_add_the_token_times_a_gate_to_the_values() -> None:
    plain, model = tiny_model(num_layers=3), tiny_model(num_layers=3, value_embeddings=True)
    attention = [layer.attention for layer in model.layers]
    assert [one.value_embedding is not None for one in attention] == [True, False, True]
    model.load_state_dict(plain.state_dict(), strict=False)
    assert not torch.allclose(model(TOKENS), plain(TOKENS))
    for one in attention[::2]:
        nn.init.zeros_(one.value_embedding.weight)
    torch.testing.assert_close(model(TOKENS), plain(TOKENS))
    # In the first layer every token has the same vector: 2 sigmoid(gate) times it is added to an average of values.
    vector = torch.arange(32.0) / 10
    one = attention[0]
    with torch.no_grad():
        one.value_embedding.weight.copy_(vector.expand(61, 32))
        x, context = torch.randn(2, 20, 32), model._context(TOKENS, None, None)
        before = plain.layers[0].attention(x, context)
        one.value_gate.weight.zero_()
        torch.testing.assert_close(one(x, context), before + one.output(vector), rtol=1e-4, atol=1e-5)


def test_value_embeddings_start_as_large_as_values_and_gates_at_one() -> None:
    model = Transformer(tiny_config(num_layers=3, dim=128, value_embeddings=True))
    model.reset_parameters(torch.Generator().manual_seed(0))
    attention = model.layers[0].attention
    assert not attention.value_gate.weight.any()
    assert attention.value_embedding.weight.std().item() == pytest.approx(0.2 * 128**0.5, rel=0.1)


def test_residual_scalars_start_neutral_and_mix_the_stream_with_the_embedding() -> None:
    plain, model = Transformer(tiny_config()), Transformer(tiny_config(residual_scalars=True))
    for one in (plain, model):
        one.reset_parameters(torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(TOKENS), plain(TOKENS))
    with torch.no_grad():
        model.stream_scale[1] = 0  # the second layer reads only the embedding, like the only layer of a model
        model.embedding_scale[1] = 1
    alone = tiny_model(num_layers=1)
    alone.layers[0] = model.layers[1]
    alone.embedding, alone.norm, alone.layers[0].attention.layer = model.embedding, model.norm, 0
    torch.testing.assert_close(model(TOKENS), alone(TOKENS))


def test_a_normalized_embedding_does_not_know_its_length() -> None:
    model = tiny_model(normalize_embedding=True, tied_embeddings=False, norm={**RMS, "eps": 1e-12})
    before = model(TOKENS)
    with torch.no_grad():
        model.embedding.weight.mul_(3)
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-4, atol=1e-5)


RMS = {"kind": "rmsnorm", "eps": 1e-5, "learned": True}


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_norms_without_weights_are_norms_whose_weights_are_ones(kind) -> None:
    shape = {"qk_norm": True, "normalize_embedding": True}
    bare = tiny_model(norm={"kind": kind, "eps": 1e-5, "learned": False}, **shape)
    learned = Transformer(tiny_config(norm={"kind": kind, "eps": 1e-5, "learned": True}, **shape))
    learned.reset_parameters(torch.Generator().manual_seed(0))
    learned.load_state_dict(bare.state_dict(), strict=False)
    torch.testing.assert_close(bare(TOKENS), learned(TOKENS))
    assert not [name for name in bare.state_dict() if "norm" in name]


def test_what_switches_cost() -> None:
    plain, values = skeleton(tiny_config(num_layers=3)), skeleton(tiny_config(num_layers=3, value_embeddings=True))
    assert parameters_by_part(values)["value embedding"] == 2 * 61 * 32
    gates = 2 * (4 * 32) * 2
    assert forward_flops(values, 20) == forward_flops(plain, 20) + gates
    windowed = skeleton(tiny_config(num_layers=3, window={"size": 5, "pattern": "S", "full_last_layer": True}))
    assert forward_flops(plain, 20) - forward_flops(windowed, 20) == 4 * 32 * 2 * 15  # two layers, 15 tokens fewer


def test_what_other_libraries_have_no_name_for_is_named() -> None:
    model = tiny_model(residual_scalars=True, softcap=5.0)
    with pytest.raises(ConfigError, match=r"no transformers .* model\.softcap = 5\.0; model\.residual_scalars"):
        to_huggingface(model.state_dict(), model.config)


def test_the_last_layer_follows_the_pattern_where_it_need_not_be_long() -> None:
    window = {"size": 5, "pattern": "S", "full_last_layer": False}
    assert [tiny_config(window=window).window_of(layer) for layer in range(2)] == [5, 5]
    window["full_last_layer"] = True
    assert [tiny_config(window=window).window_of(layer) for layer in range(2)] == [5, None]


def test_norms_start_as_the_identity_scale_whatever_their_offset() -> None:
    for offset in (0, 1):
        model = Transformer(tiny_config(norm={"offset": offset, "placement": "both"}, qk_norm=True))
        for _ in range(2):  # as built, and as initialized
            scales = [one.scale() for one in model.modules() if isinstance(one, Norm)]
            assert len(scales) == 2 * (4 + 2) + 1
            assert all(torch.equal(scale, torch.ones_like(scale)) for scale in scales)
            model.reset_parameters(torch.Generator().manual_seed(0))


def test_a_high_softcap_leaves_attention_as_it_is_and_a_low_one_does_not() -> None:
    plain = tiny_model(num_kv_heads=2)
    for softcap, same in ((1e4, True), (0.5, False)):
        capped = with_weights_of(plain, num_kv_heads=2, attention_softcap=softcap)
        assert torch.allclose(capped(TOKENS), plain(TOKENS), rtol=1e-4, atol=1e-4) == same


def test_layers_with_a_window_have_their_own_theta() -> None:
    window = {"size": 100, "pattern": "SL", "full_last_layer": False}  # longer than the text
    shape = {"num_layers": 2, "window": window}
    one = tiny_model(**shape, rope={"theta": 1e4, "local_theta": 20.0, "scaling": {"kind": "linear", "factor": 2.0}})
    for theta, scaling, layer in ((20.0, None, 0), (1e4, {"kind": "linear", "factor": 2.0}, 1)):
        other = with_weights_of(one, **shape, rope={"theta": theta, "scaling": scaling})
        x = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(3))
        outputs = [model.layers[layer](x, model._context(TOKENS, None, None)) for model in (one, other)]
        torch.testing.assert_close(*outputs)
        outputs = [model.layers[1 - layer](x, model._context(TOKENS, None, None)) for model in (one, other)]
        assert not torch.allclose(*outputs)
