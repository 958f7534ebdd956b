"""Rounding: the same numbers and gradients as torchao, and models that compute the same as their conversions."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config, tiny_model
from torch import Tensor, nn

from pretune.adapters.attach import attach, merge
from pretune.adapters.config import AdapterConfig
from pretune.core.batch import Batch
from pretune.core.config import Section, validate
from pretune.model.transformer import Transformer
from pretune.objectives.language_modeling import language_modeling
from pretune.quantization.config import FakeQuantizationConfig, Int8Int4Config, QuantizationConfig, misfit_of_groups
from pretune.quantization.convert import convert
from pretune.quantization.fake_quantization import (
    enable_fake_quantization,
    fake_quantization,
    fake_quantization_enabled,
    prepare_qat,
    round_weights_in_place,
)
from pretune.quantization.rounding import Grid, grids, round_activations, round_weight, scales

TOKENS = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(1))
PHONE = Int8Int4Config(kind="int8_int4", group_size=16, embedding="int4", head="int4")


class Holder(Section):
    quantization: QuantizationConfig


def section(kind: str, **changes: Any) -> Any:
    start = {"start": 0.0} if kind.startswith("qat") else {}
    fields = {"kind": kind, "group_size": 16, "embedding": "int4", "head": "int4", **start, **changes}
    return validate(Holder, {"quantization": fields}).quantization


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval().unembed(model(TOKENS))


def both(function: Any, x: Tensor, weigh: Tensor) -> tuple[Tensor, Tensor]:
    """`function(x)`, and the gradient of x under a weighted sum."""
    x = x.clone().requires_grad_(True)
    y = function(x)
    (y * weigh).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("grid", [Grid(4, 16), Grid(8, None)])
def test_weights_and_their_gradients_are_torchaos(grid: Grid) -> None:
    from torchao.quantization.quant_primitives import _fake_quantize_affine

    weight, found = random(24, 48), scales(random(24, 48), grid)
    zeros = torch.zeros_like(found)

    def reference(x: Tensor) -> Tensor:
        return _fake_quantize_affine(x, (1, grid.group_size or 48), found, zeros, torch.int32, *grid.bounds)

    for ours, theirs in zip(
        both(lambda x: round_weight(x, grid), weight, random(24, 48, seed=1)),
        both(reference, weight, random(24, 48, seed=1)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_scales_are_torchaos_rounded_to_16_bits_for_groups() -> None:
    from torchao.quantization.utils import get_group_qparams_symmetric

    weight = random(24, 48)
    theirs, _ = get_group_qparams_symmetric(weight, 4, 16)
    assert torch.equal(scales(weight, Grid(4, 16)), theirs.bfloat16().float())
    theirs, _ = get_group_qparams_symmetric(weight, 8, 48)
    assert torch.equal(scales(weight, Grid(8, None)), theirs)


def test_activations_and_their_gradients_are_torchaos() -> None:
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import FakeQuantizerBase

    theirs = FakeQuantizerBase.from_config(IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False))
    x = torch.cat([random(5, 9, 32), random(1, 9, 32).abs() + 3, torch.zeros(1, 9, 32)])  # one-sided, and all zeros
    weigh = random(7, 9, 32, seed=1)
    for one, other in zip(both(round_activations, x, weigh), both(theirs, x, weigh), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([Grid(4, 8), Grid(8, None)]), st.sampled_from([1e-30, 1e-3, 1.0, 1e4]))
def test_no_number_moves_by_more_than_half_a_step(seed: int, grid: Grid, size: float) -> None:
    weight = size * random(3, 16, seed=seed)
    step = scales(weight, grid).repeat_interleave(grid.group_size or 16, 1)
    assert ((round_weight(weight, grid) - weight).abs() <= 0.53 * step).all()
    assert torch.equal(round_weight(torch.zeros(2, 16), grid), torch.zeros(2, 16))


@pytest.mark.parametrize("kind", ["int8_weight_only", "int4_weight_only", "int8_int4", "qat_int8_int4"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("embedding", "head"), [("int4", "int8"), ("int8", "int4"), ("none", "none")])
def test_prepared_settled_and_converted_are_one_model(kind: str, tied: bool, embedding: str, head: str) -> None:
    plain = tiny_model(tied_embeddings=tied, value_embeddings=True, bias={"qkv": True, "attention_output": True,
                       "mlp": True})  # fmt: skip
    config = section(kind, embedding=embedding, head=head)
    prepared, converted = copy.deepcopy(plain), copy.deepcopy(plain)
    prepare_qat(prepared, config)
    assert list(prepared.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in prepared.named_parameters()] == [name for name, _ in plain.named_parameters()]
    settled = copy.deepcopy(prepared)
    round_weights_in_place(settled)
    convert(converted, config)
    assert torch.equal(logits(settled), logits(prepared))
    torch.testing.assert_close(logits(converted), logits(prepared), rtol=1e-4, atol=1e-4)
    assert (logits(prepared) - logits(plain)).abs().max() > 1e-3
    with fake_quantization(prepared, False):
        assert torch.equal(logits(prepared), logits(plain))
    assert fake_quantization_enabled(prepared)


def test_the_training_loss_is_that_of_the_head_as_it_is_stored() -> None:
    for tied in (True, False):
        model = tiny_model(tied_embeddings=tied)
        prepare_qat(model, PHONE)
        batch = Batch(TOKENS, TOKENS.roll(-1, 1), None)
        wanted = nn.functional.cross_entropy(logits(model).flatten(0, 1), batch.targets.flatten(), reduction="sum")
        torch.testing.assert_close(language_modeling(model, batch, 7), wanted, rtol=1e-5, atol=1e-4)


def test_switching_compiles_once_for_each_way_and_breaks_no_graph() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    model = tiny_model()
    prepare_qat(model, PHONE, enabled=False)
    batch = Batch(TOKENS, TOKENS.roll(-1, 1), None)
    counter = CompileCounterWithBackend("eager")

    def loss(batch: Batch) -> Tensor:
        return language_modeling(model, batch, 64)

    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=False)
    for rounding in (False, True, False, True, True):
        enable_fake_quantization(model, rounding)
        torch.testing.assert_close(compiled(batch), loss(batch), rtol=1e-5, atol=1e-4)
        compiled(batch).backward()
    assert counter.frame_count == 2


def adapters() -> list[Any]:
    class Adapter(Section):
        adapter: AdapterConfig

    common = {"rank": 2, "alpha": 4, "dropout": 0.0, "targets": ["all"], "init_from": None, "train_embeddings": "none"}
    low_rank = {**common, "rslora": False, "init": "zero", "lr_ratio": 1.0}
    kinds = [{"kind": "lora", **low_rank}, {"kind": "dora", **low_rank}, {"kind": "loha", **common}]
    kinds += [{"kind": "lokr", **common, "factor": None}]
    return [validate(Adapter, {"adapter": kind}).adapter for kind in kinds]


@pytest.mark.parametrize("adapter", adapters(), ids=lambda one: one.kind)
def test_the_sum_of_weight_and_adapter_is_rounded_as_it_will_be_merged(adapter: Any) -> None:
    model, generator = tiny_model(), torch.Generator().manual_seed(3)
    attach(model, adapter, seed=0)
    trained = [one for one in model.parameters() if one.requires_grad]
    with torch.no_grad():
        for one in trained:
            one.add_(0.2 * torch.randn(one.shape, generator=generator))
    merged = copy.deepcopy(model)
    prepare_qat(model, PHONE)
    merge(merged)
    prepare_qat(merged, PHONE)
    torch.testing.assert_close(logits(model), logits(merged), rtol=1e-3, atol=1e-3)
    language_modeling(model, Batch(TOKENS, TOKENS.roll(-1, 1), None), 64).backward()
    assert all(one.grad is not None and one.grad.any() for one in trained)


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (32, {}, r"group_size \(32\) does not divide the 48 inputs of the layer mlp\.down; .* are 16$"),
        (12, {}, r"the 32 inputs of the layer embedding; .* are 8 and 16$"),
        (32, {"mlp_dim": 47}, r"the 47 inputs of the layer mlp\.down; no size does$"),
        (16, {}, None),
    ],
)
def test_a_group_size_that_does_not_fit_names_the_layer_and_the_nearest(
    size: int, changes: dict[str, Any], message: str | None
) -> None:
    config = PHONE.model_copy(update={"group_size": size})
    found = misfit_of_groups(config, tiny_config(**changes).matrix_inputs())
    if message is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(message, found)


def test_every_matrix_that_is_stored_is_known_by_its_inputs() -> None:
    for changes in ({}, {"tied_embeddings": False, "value_embeddings": True, "activation": "relu_squared"}):
        model = Transformer(tiny_config(**changes))
        inputs = tiny_config(**changes).matrix_inputs()
        config: FakeQuantizationConfig = PHONE
        stored = {name: model.get_submodule(name) for name in grids(model, config)}
        found = {name.split(".", 2)[-1] if "layers." in name else name: module for name, module in stored.items()}
        assert {name: module.weight.shape[1] for name, module in found.items()} == inputs  # pyright: ignore
