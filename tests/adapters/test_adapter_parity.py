"""Adapters against peft: on transformers' Llama with the same weights, and with peft's own layers in our model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import transformers
from adapted import FORMS, of_form, perturb, use_layers_of_peft
from tiny import tiny_model, transformers_llama
from torch import Tensor, nn

from pretune.adapters.attach import adapted_layers, attach
from pretune.core.batch import Batch
from pretune.objectives.language_modeling import language_modeling

TWINS = {"attention.output": "self_attn.o_proj", "mlp.down": "mlp.down_proj"}
TOKENS = torch.randint(0, 61, (3, 33), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> Tensor:
    if isinstance(model, transformers.PreTrainedModel):
        return model(TOKENS[:, :-1]).logits
    return model.unembed(model(TOKENS[:, :-1]))  # pyright: ignore


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(logits(model).flatten(0, 1), TOKENS[:, 1:].flatten())


def three_steps(model: nn.Module) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(3):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()


def twins(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Our trained parameters, and their names in the Llama."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            theirs = f"model.{name}"
            for ours, other in TWINS.items():
                theirs = theirs.replace(ours, other)
            yield name, theirs, parameter


@pytest.mark.parametrize("form", FORMS)
def test_forward_and_three_steps_equal_peft_on_transformers_llama(form: str) -> None:
    model = tiny_model()
    reference = transformers_llama(model)
    attach(model, of_form(form, targets=list(TWINS)), seed=0)
    config = copy.deepcopy(model.peft_config["default"])  # pyright: ignore
    config.target_modules = {"o_proj", "down_proj"}
    reference = peft.inject_adapter_in_model(config, reference).train()
    perturb(model, scale=0.0 if "pissa" in form else 0.1)
    with torch.no_grad():
        for _, theirs, parameter in twins(model):
            reference.get_parameter(theirs).copy_(parameter)
    assert {theirs for _, theirs, _ in twins(model)} == {
        name for name, parameter in reference.named_parameters() if parameter.requires_grad
    }
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-4)
    three_steps(model)
    three_steps(reference)
    for name, theirs, parameter in twins(model):
        torch.testing.assert_close(
            parameter, reference.get_parameter(theirs), rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_fused_layers_equal_peft_on_the_same_layers(form: str, bias: bool) -> None:
    biases = {"qkv": bias, "attention_output": bias, "mlp": bias}
    model = tiny_model(bias=biases)
    attach(model, of_form(form), seed=3)
    assert all(type(layer).__module__ == "pretune.adapters.layers" for layer in adapted_layers(model).values())
    reference = tiny_model(bias=biases)
    attach(reference, of_form(form), seed=3)
    use_layers_of_peft(reference)
    for one in (model, reference):
        perturb(one, scale=0.0 if "pissa" in form else 0.1)
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-4)
    gradients = [
        dict(zip(names(one), torch.autograd.grad(loss_of(one), trained(one)), strict=True))
        for one in (model, reference)
    ]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradient, gradients[1][name], rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("form", ["lora", "lokr"])
def test_gradients_equal_finite_differences_in_float64(form: str) -> None:
    model = tiny_model(num_layers=1).double()
    attach(model, of_form(form, targets=["qkv"]), seed=0)
    model.double()
    perturb(model)
    hidden = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True)
    layer = adapted_layers(model)["layers.0.attention.qkv"]

    def output(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(names(layer), parameters, strict=True))
        return torch.func.functional_call(layer, named, (x,))

    assert torch.autograd.gradcheck(output, (hidden, *trained(layer)), fast_mode=True)


def test_lora_on_a_fused_layer_is_peft_on_its_parts_with_one_first_factor() -> None:
    """Unlike separate adapters on q, k and v, these share the first factor; each has its own rows of the second."""
    model = tiny_model(num_kv_heads=2)
    reference = transformers_llama(model)
    attach(model, of_form("lora", targets=["qkv"]), seed=0)
    perturb(model)
    parts = {"q_proj": 32, "k_proj": 16, "v_proj": 16}
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(parts))
    reference = peft.inject_adapter_in_model(config, reference)
    with torch.no_grad():
        for index in range(2):
            fused: Any = model.get_submodule(f"layers.{index}.attention.qkv")
            rows = fused.lora_B["default"].weight.split(list(parts.values()))
            for part, second in zip(parts, rows, strict=True):
                layer: Any = reference.get_submodule(f"model.layers.{index}.self_attn.{part}")
                layer.lora_A["default"].weight.copy_(fused.lora_A["default"].weight)
                layer.lora_B["default"].weight.copy_(second)
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["lora", "dora", "loha", "lokr"])
def test_compiled_in_bfloat16_it_trains_and_is_compiled_once(form: str) -> None:
    model = tiny_model(num_layers=1, num_heads=2, num_kv_heads=2)
    attach(model, of_form(form), seed=0)
    torch.compiler.reset()

    def sum_of_loss(inputs: Tensor, targets: Tensor) -> Tensor:
        return language_modeling(model, Batch(inputs, targets, None), 64)

    # Guards and graphs do not depend on the code generator, which takes most of the time.
    compiled = torch.compile(sum_of_loss, dynamic=False, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    losses = []
    for step in range(4):
        with torch.autocast("cpu", torch.bfloat16), torch._dynamo.config.patch(error_on_recompile=step > 0):
            loss = compiled(TOKENS[:, :-1].contiguous(), TOKENS[:, 1:].contiguous()) / 96
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("form", FORMS)
def test_compiled_it_evaluates_in_one_graph(form: str) -> None:
    model = tiny_model()
    attach(model, of_form(form), seed=0)
    perturb(model)
    model.eval()
    torch.compiler.reset()
    compiled = torch.compile(logits, dynamic=False, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(model), logits(model), rtol=1e-4, atol=1e-4)
