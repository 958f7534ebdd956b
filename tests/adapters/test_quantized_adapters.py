"""Adapters on 4-bit weights: the same as on the dequantized weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapted import adapter_section, perturb
from tiny import tiny_model
from torch import Tensor

from pretune.adapters.attach import attach, check_gradients, merge, switched_off
from pretune.core.batch import Batch
from pretune.objectives.language_modeling import language_modeling
from pretune.quantization.config import QloraConfig
from pretune.quantization.nf4 import NF4Linear, dequantize, quantize

QLORA = QloraConfig(kind="qlora_nf4", block_size=64)
TOKENS = torch.randint(0, 61, (3, 33), generator=torch.Generator().manual_seed(1))
INPUTS, TARGETS = TOKENS[:, :-1].contiguous(), TOKENS[:, 1:].contiguous()
FORMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora pissa": {"kind": "lora", "init": "pissa"},
    "lora on attention": {"kind": "lora", "targets": ["attention"]},
    "dora": {},
    "loha": {"rank": 2},
    "loha of a high rank": {"kind": "loha", "rank": 6},
    "lokr": {"rank": 2},
    "lokr of a high rank": {"kind": "lokr", "rank": 32},
}


def adapted(form: str, bias: bool = False) -> Any:
    model = tiny_model(bias={"qkv": bias, "attention_output": bias, "mlp": bias})
    attach(model, adapter_section(**{"kind": form, **FORMS[form]}), seed=0)
    quantize(model, QLORA)
    perturb(model, scale=0.0 if "pissa" in form else 0.1)
    return model


def loss_of(model: Any, inputs: Tensor = INPUTS, targets: Tensor = TARGETS) -> Tensor:
    return language_modeling(model, Batch(inputs, targets, None), 64) / 96


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_loss_gradients_and_merging(form: str, bias: bool) -> None:
    model, reference = adapted(form, bias), adapted(form, bias)
    assert sum(isinstance(module, NF4Linear) for module in model.modules()) == 8
    dequantize(reference)
    for one in (model, reference):
        loss_of(one).backward()
    check_gradients(model)
    others = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                parameter.grad, others[name].grad, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
    with torch.no_grad():
        hidden = model(INPUTS)
        torch.testing.assert_close(hidden, reference(INPUTS), rtol=1e-4, atol=1e-5)
        with switched_off(model), switched_off(reference):
            torch.testing.assert_close(model(INPUTS), reference(INPUTS), rtol=1e-4, atol=1e-5)
        dequantize(model)
        merge(model)
        torch.testing.assert_close(model(INPUTS), hidden, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["lora", "dora", "loha", "lokr"])
def test_compiled_it_is_one_graph_compiled_once(form: str) -> None:
    model = tiny_model(num_layers=1, num_heads=2, num_kv_heads=2)
    attach(model, adapter_section(form), seed=0)
    quantize(model, QLORA)
    torch.compiler.reset()
    compiled = torch.compile(lambda i, t: loss_of(model, i, t), dynamic=False, fullgraph=True, backend="aot_eager")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for step in range(4):
        with torch.autocast("cpu", torch.bfloat16), torch._dynamo.config.patch(error_on_recompile=step > 0):
            loss = compiled(INPUTS, TARGETS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("form", ["lora", "lokr"])
def test_the_partitioner_keeps_no_weight_for_the_backward_pass(form: str) -> None:
    model = tiny_model(num_layers=1, num_heads=2, num_kv_heads=2)
    attach(model, adapter_section(form), seed=0)
    quantize(model, QLORA)
    shapes = {tuple(layer.weight.shape) for layer in model.modules() if isinstance(layer, NF4Linear)}
    assert len(shapes) == 4
    torch.compiler.reset()
    kept: set[tuple[int, ...]] = set()

    def pack(tensor: Tensor) -> Tensor:
        kept.add(tuple(tensor.shape))
        return tensor

    backend = "aot_eager_decomp_partition"  # the real compiler's partitioner, without its code generator
    compiled = torch.compile(lambda i, t: loss_of(model, i, t), dynamic=False, fullgraph=True, backend=backend)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        compiled(INPUTS[:, :20].contiguous(), TARGETS[:, :20].contiguous())  # no activation has the shape of a weight
    assert kept
    assert kept & (shapes | {shape[::-1] for shape in shapes}) == set()
