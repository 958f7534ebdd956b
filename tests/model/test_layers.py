"""Norms, activations and rotary positions against torch and transformers."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_config, tiny_model
from transformers.activations import ACT2FN

from pretune.core.config import validate
from pretune.model.config import NormConfig
from pretune.model.layers import MLP, EmbeddingScale, Norm, activate
from pretune.model.rope import Rope, rotate
from pretune.model.rope_config import RopeConfig

THEIR_NAMES = {
    "swiglu": "silu",
    "silu": "silu",
    "geglu": "gelu_pytorch_tanh",
    "gelu": "gelu_pytorch_tanh",
    "reglu": "relu",
    "relu": "relu",
    "relu_squared": "relu2",
}


@pytest.mark.parametrize("activation", THEIR_NAMES)
def test_activations_are_the_ones_of_transformers(activation) -> None:
    x = torch.linspace(-6, 6, 1001)
    torch.testing.assert_close(activate(x, activation), ACT2FN[THEIR_NAMES[activation]](x))


@pytest.mark.parametrize("activation", THEIR_NAMES)
def test_mlp_multiplies_gate_and_up_where_gated(activation) -> None:
    torch.manual_seed(0)
    config = tiny_config(activation=activation, bias={"qkv": False, "attention_output": False, "mlp": True})
    mlp, x = MLP(config), torch.randn(5, 32)
    function = ACT2FN[THEIR_NAMES[activation]]
    if activation in ("swiglu", "geglu", "reglu"):
        weight, bias = mlp.gate_up.weight, mlp.gate_up.bias
        hidden = function(x @ weight[:48].T + bias[:48]) * (x @ weight[48:].T + bias[48:])
    else:
        hidden = function(x @ mlp.up.weight.T + mlp.up.bias)
    torch.testing.assert_close(mlp(x), hidden @ mlp.down.weight.T + mlp.down.bias)


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_norm_is_computed_in_float32(kind) -> None:
    norm = Norm(
        512, validate(NormConfig, {"kind": kind, "eps": 1e-5, "learned": True, "offset": 0, "placement": "before"})
    ).bfloat16()
    x = (3 + torch.randn(7, 512, generator=torch.Generator().manual_seed(0))).bfloat16()
    wide = x.double()
    if kind == "rmsnorm":
        exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    else:
        exact = (wide - wide.mean(-1, keepdim=True)) * (wide.var(-1, keepdim=True, correction=0) + 1e-5).rsqrt()
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x).double(), exact, rtol=2**-8, atol=1e-6)  # one rounding to bf16


def test_rotary_table_is_exact_and_stays_float32_whatever_the_module_becomes() -> None:
    model = tiny_model(max_sequence_length=4096)
    exact = torch.outer(torch.arange(4096).double(), 1e4 ** -(torch.arange(0, 8, 2).double() / 8))
    exact = torch.stack((exact.cos(), exact.sin())).float()
    for moved in (model, model.bfloat16(), model.half(), model.to("meta").to_empty(device="cpu")):
        assert moved.rope.table.dtype == torch.float32
        assert torch.equal(moved.rope.table, exact)
    assert not [name for name in model.state_dict() if "rope" in name]


def test_bf16_positions_are_all_distinct() -> None:
    rope = Rope(
        validate(RopeConfig, {"theta": 1e4, "local_theta": None, "fraction": 1.0, "scaling": None, "pattern": "R"}),
        64,
        512,
    ).bfloat16()
    assert len(rope.table[:, :, 0].T.unique(dim=0)) == 512


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_rotation_turns_complex_pairs_of_the_rotated_share(fraction) -> None:
    rope = Rope(
        validate(
            RopeConfig, {"theta": 100.0, "local_theta": None, "fraction": fraction, "scaling": None, "pattern": "R"}
        ),
        16,
        10,
    )
    heads = torch.randn(2, 10, 3, 16, generator=torch.Generator().manual_seed(0))
    turned, width = rotate(heads, rope.first(10)), int(16 * fraction)
    half = width // 2
    pairs = torch.complex(heads[..., :half].double(), heads[..., half:width].double())
    angles = torch.outer(torch.arange(10).double(), 100.0 ** -(torch.arange(0, width, 2).double() / max(width, 1)))
    exact = pairs * torch.exp(1j * angles)[None, :, None]
    torch.testing.assert_close(turned[..., :width].double(), torch.cat((exact.real, exact.imag), -1), rtol=0, atol=1e-6)
    assert torch.equal(turned[..., width:], heads[..., width:])
    by_row = rotate(heads, rope(torch.arange(10).expand(2, 10)))
    assert torch.equal(by_row, turned)


def test_gemmas_norms_and_embeddings_are_rounded_as_there() -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm, Gemma2TextScaledWordEmbedding

    torch.manual_seed(0)
    section = {"kind": "rmsnorm", "eps": 1e-6, "learned": True, "offset": 1, "placement": "both"}
    ours, theirs = Norm(512, validate(NormConfig, section)), Gemma2RMSNorm(512, 1e-6)
    assert not ours.weight.any()
    with torch.no_grad():
        for norm in (ours, theirs):
            norm.weight.copy_(torch.randn(512, generator=torch.Generator().manual_seed(1)) / 100)
            norm.bfloat16()
    x = torch.randn(64, 512).bfloat16()
    difference = (ours(x).float() - theirs(x).float()).abs() / theirs(x).float().abs().clamp(min=1e-6)
    assert (difference > 0).float().mean() < 0.01  # a sum in another order, at the edge between two numbers
    assert difference.max() <= 2**-7
    # sqrt(3072) is 55.43, and 55.5 in bfloat16.
    for dtype, factor in ((torch.bfloat16, 55.5), (torch.float32, 3072**0.5)):
        table = Gemma2TextScaledWordEmbedding(7, 3072, None, embed_scale=3072**0.5).to(dtype)
        scaled = EmbeddingScale(3072)(table.weight)
        assert torch.equal(scaled, table(torch.arange(7)))
        assert torch.equal(scaled, table.weight * factor)
