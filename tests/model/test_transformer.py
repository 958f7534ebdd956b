"""The transformer: shapes, initial weights, documents and cache."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILY_SWITCHES, GPT2, tiny_config, tiny_model

from pretune.core.config import InputError
from pretune.model.attention import KVCache
from pretune.model.counts import count_parameters
from pretune.model.transformer import Transformer

BIASES = {"qkv": True, "attention_output": True, "mlp": True}
VARIANTS = {
    "plain": {},
    "grouped": {"num_kv_heads": 2, "qk_norm": True, "head_dim": 6},
    "layernorm": {"norm": {"kind": "layernorm", "eps": 1e-6, "learned": True}, "activation": "gelu", "bias": BIASES},
    "capped": {"softcap": 5.0, "tied_embeddings": False, "activation": "relu_squared", "vocab_multiple_of": 64},
    "half_rotated": {
        "rope": {"theta": 1e4, "fraction": 0.5, "scaling": None, "pattern": "R"},
        "num_kv_heads": 1,
        "activation": "geglu",
    },
    "windows": {
        "num_layers": 3,
        "window": {"size": 3, "pattern": "SL", "full_last_layer": True},
        "attention_scale": 1.4,
    },
    "values": {"num_layers": 3, "value_embeddings": True, "num_kv_heads": 2, "residual_scalars": True},
    "gpt2": GPT2,
    "bare": {"norm": {"kind": "rmsnorm", "eps": 1e-6, "learned": False}, "qk_norm": True, "normalize_embedding": True},
    **FAMILY_SWITCHES,
}


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_noam_wide_counts_as_published() -> None:
    with torch.device("meta"):
        config = tiny_config(
            num_layers=10, dim=1024, num_heads=16, num_kv_heads=16, head_dim=64, mlp_dim=2816, vocab_size=50304
        )
        assert count_parameters(Transformer(config)).total == 179_983_360


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_and_logits_have_their_shapes_and_no_position_sees_the_future(variant) -> None:
    model = tiny_model(**VARIANTS[variant])
    read = tokens(2, 20)
    hidden = model(read)
    assert hidden.shape == (2, 20, 32)
    assert model.unembed(hidden).shape == (2, 20, 61)
    changed = read.clone()
    changed[:, 11:] = (changed[:, 11:] + 1) % 61
    torch.testing.assert_close(model(changed)[:, :11], hidden[:, :11])
    assert not torch.allclose(model(changed)[:, 11:], hidden[:, 11:])


def test_order_matters_only_with_rotary_positions() -> None:
    # The last of three tokens sees the first two in either order; with one layer they have not seen each other.
    for fraction, differs in ((1.0, True), (0.0, False)):
        model = tiny_model(num_layers=1, rope={"theta": 1e4, "fraction": fraction, "scaling": None, "pattern": "R"})
        there, back = model(torch.tensor([[5, 9, 7]]))[0, -1], model(torch.tensor([[9, 5, 7]]))[0, -1]
        assert torch.allclose(there, back, atol=1e-5) != differs


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3).filter(lambda x: sum(x) <= 20),
    variant=st.sampled_from(sorted(VARIANTS)),
)
def test_documents_in_one_row_are_as_if_alone(lengths, variant) -> None:
    model, length = tiny_model(**VARIANTS[variant]), sum(lengths) + 2
    read = tokens(1, length)
    ids = [number for number, n in enumerate(lengths) for _ in range(n)] + [-1, -1]  # two tokens of padding
    packed = model(read, torch.tensor([ids], dtype=torch.int32))
    assert packed.isfinite().all()
    start = 0
    for n in [*lengths, 2]:
        torch.testing.assert_close(
            packed[:, start : start + n], model(read[:, start : start + n]), rtol=1e-4, atol=1e-5
        )
        start += n


def test_one_document_is_the_same_as_none() -> None:
    model, read = tiny_model(), tokens(2, 32)
    torch.testing.assert_close(model(read, torch.zeros(2, 32, dtype=torch.int32)), model(read))


def test_positions_restart_with_each_document() -> None:
    model = tiny_model()
    ids = torch.tensor([[3, 3, 3, 1, 1, 7, 7, 7]], dtype=torch.int32)
    cos_sin = model._context(tokens(1, 8), ids, None).cos_sin
    assert torch.equal(cos_sin, model.rope(torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])))


def test_gradients_are_finite_where_a_row_is_all_padding() -> None:
    model = tiny_model()
    model(tokens(2, 8), torch.tensor([[0] * 8, [-1] * 8], dtype=torch.int32)).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_reading_piece_by_piece_equals_reading_at_once(variant) -> None:
    model, read = tiny_model(**VARIANTS[variant]).eval(), tokens(3, 20)
    starts = torch.tensor([0, 4, 7])  # padding columns on the left
    with torch.no_grad():
        cache = KVCache(model.config, starts, 20, torch.float32)
        pieces = []
        for piece in read.split([9, 1, 1, 5, 4], dim=1):
            cache.advance(piece.shape[1], whole=len(pieces) % 2 == 1)
            pieces.append(model(piece, cache=cache))
        hidden = torch.cat(pieces, dim=1)
        assert hidden.isfinite().all()
        for row, start in enumerate(starts.tolist()):
            alone = model(read[row : row + 1, start:])
            torch.testing.assert_close(hidden[row : row + 1, start:], alone, rtol=1e-4, atol=1e-5)


def test_a_sequence_longer_than_the_positions_is_an_error() -> None:
    model = tiny_model(max_sequence_length=16)
    assert model(tokens(1, 16)).shape == (1, 16, 32)
    with pytest.raises(InputError, match=r"17 tokens.*16 positions.*max_sequence_length"):
        model(tokens(1, 17))


@pytest.mark.parametrize(("output", "expected"), [("scaled", 0.2 / math.sqrt(4)), ("plain", 0.2), ("zero", 0.0)])
def test_weights_start_as_configured(output, expected) -> None:
    config = tiny_config(
        dim=128,
        mlp_dim=256,
        init={"std": 0.2, "embedding_std": 0.2, "head_std": 0.2, "output": output},
        bias=BIASES,
        tied_embeddings=False,
    )
    model = Transformer(config)
    model.reset_parameters(torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "norm" in name:
            assert (parameter == 1).all()
        else:
            std = expected if name.endswith(("output.weight", "down.weight")) else 0.2
            assert parameter.std().item() == pytest.approx(std, rel=0.05)
            assert parameter.mean().item() == pytest.approx(0, abs=0.01)


def test_weights_depend_on_the_generator_alone() -> None:
    first, second = Transformer(tiny_config()), Transformer(tiny_config())
    first.reset_parameters(torch.Generator().manual_seed(3))
    torch.manual_seed(99)
    second.reset_parameters(torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_zero_output_makes_every_block_the_identity() -> None:
    model = Transformer(tiny_config(init={"std": 0.2, "embedding_std": 0.2, "head_std": 0.2, "output": "zero"}))
    model.reset_parameters(torch.Generator().manual_seed(0))
    read = tokens(2, 10)
    torch.testing.assert_close(model(read), model.norm(model.embedding(read)))


def test_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    model, read = tiny_model(dropout=0.5), tokens(2, 10)
    plain = tiny_model(dropout=0.0)(read)
    torch.testing.assert_close(model.eval()(read), plain)
    torch.manual_seed(0)
    assert not torch.allclose(model.train()(read), plain)


def test_softcap_bends_logits() -> None:
    capped, plain = tiny_model(softcap=2.0), tiny_model()
    hidden = capped(tokens(1, 10))
    torch.testing.assert_close(capped.unembed(hidden), 2 * torch.tanh(plain.unembed(hidden) / 2))


def test_modules_have_the_names_that_adapters_and_optimizers_look_for() -> None:
    names = dict(tiny_model(qk_norm=True, tied_embeddings=False).named_modules())
    linear = {name for name, module in names.items() if isinstance(module, torch.nn.Linear)}
    inside = ("attention.qkv", "attention.output", "mlp.gate_up", "mlp.down")
    assert linear == {"head"} | {f"layers.{i}.{name}" for i in range(2) for name in inside}
    assert isinstance(names["embedding"], torch.nn.Embedding)
