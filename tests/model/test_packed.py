"""Packed linear layers compute what plain ones do."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch
from tiny import FAMILY_SWITCHES, tiny_model

from pretune.model.packed import PackedLinear, PlainNorm, packed

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available(),
    reason="weights are packed on x86 CPUs with oneDNN",
)
SHAPES: list[dict[str, Any]] = [
    {},
    {"tied_embeddings": False, "softcap": 5.0},
    {"bias": {"qkv": True, "attention_output": True, "mlp": True}, "num_kv_heads": 2},
    {"value_embeddings": True, "qk_norm": True, "activation": "relu_squared", "normalize_embedding": True},
    *FAMILY_SWITCHES.values(),
]


BF16 = pytest.param(
    torch.bfloat16,
    0.05,
    marks=pytest.mark.skipif(
        not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 on this CPU"
    ),
)


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), BF16], ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_a_packed_twin_computes_the_same(
    changes: dict[str, Any], dtype: torch.dtype, tolerance: float, rows: int
) -> None:
    model = tiny_model(**changes).eval()
    twin = packed(model, dtype)
    assert twin is not None
    tokens = torch.randint(0, 61, (rows, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected, found = (one.unembed(one(tokens)) for one in (model, twin))
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() < tolerance * expected.std()


def test_a_type_that_the_cpu_lacks_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    # oneDNN would raise RuntimeError in the middle of generation.
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert packed(tiny_model(), torch.bfloat16) is None
    assert packed(tiny_model(), torch.float16) is None
    assert packed(tiny_model(), torch.float32) is not None


def test_the_twin_shares_what_is_not_packed_and_leaves_the_model_alone() -> None:
    model = tiny_model()
    before = {name: type(module) for name, module in model.named_modules()}
    twin = packed(model, torch.float32)
    assert twin is not None
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert model.head is None
    assert twin.embedding.weight is model.embedding.weight
    assert twin.rope.table is model.rope.table
    assert isinstance(twin.get_submodule("layers.0.mlp.down"), PackedLinear)
    assert isinstance(twin.get_submodule("layers.0.attention_norm"), PlainNorm)


def test_layers_that_do_more_than_multiply_stay_as_they_are() -> None:
    from pretune.core.config import validate
    from pretune.quantization.config import QatConfig
    from pretune.quantization.fake_quantization import FakeQuantizedLinear, prepare_qat

    model = tiny_model()
    section = {"kind": "qat_int8_int4", "group_size": 16, "embedding": "int4", "head": "int4", "start": 0.0}
    prepare_qat(model, validate(QatConfig, section))
    twin = packed(model.eval(), torch.float32)
    assert twin is not None
    assert isinstance(twin.get_submodule("layers.0.mlp.down"), FakeQuantizedLinear)
    assert twin.head is None
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        expected, found = (one.unembed(one(tokens)) for one in (model, twin))
    assert (found - expected).abs().max() < 0.05 * expected.std()  # 8-bit rounding may go the other way


def test_other_types_are_not_packed() -> None:
    assert packed(tiny_model(), torch.float16) is None
    assert packed(tiny_model().to("meta"), torch.float32) is None
