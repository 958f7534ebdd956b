"""The compiled training step: one graph, compiled once; and activation checkpointing."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_model
from torch import Tensor
from torch._dynamo.utils import counters

from pretune.compute.compilation import checkpoint_activations, compile_step, why_not_compiled
from pretune.core.batch import IGNORE, Batch
from pretune.core.config import validate
from pretune.model.transformer import Transformer
from pretune.objectives.language_modeling import language_modeling
from pretune.run.config import RunConfig
from pretune.run.losses import training_loss
from pretune.run.model import apply_precision
from pretune.run.parts import Parts

Compose = Callable[..., dict[str, Any]]
torchs_own = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its compiler does what it deprecates


def batch(seed: int, isolated: bool, rows: int = 2) -> Batch:
    """Sequences of 32 tokens, with documents of any length and some tokens not scored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 61, (rows, 33), generator=generator)
    targets = tokens[:, 1:].masked_fill(torch.rand(rows, 32, generator=generator) < 0.2, IGNORE)
    ends = (torch.rand(rows, 32, generator=generator) < 0.1).int()
    return Batch(tokens[:, :-1], targets, ends.cumsum(1, dtype=torch.int32) if isolated else None)


def gradients(model: Transformer, loss: Callable[[Batch], Tensor], data: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    loss(data).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@torchs_own
@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_training_step_is_one_graph_compiled_once(
    tiny: Compose, monkeypatch: pytest.MonkeyPatch, isolated: bool, checkpointed: bool
) -> None:
    # Graphs and recompilations do not depend on the code generator, which takes most of the time.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    settings = ["precision=bf16", "precision.compile=true", f"precision.activation_checkpointing={checkpointed}"]
    config = validate(RunConfig, tiny(*settings, "model.dropout=0.1"))
    switches = {
        "window": {"size": 8, "pattern": "SL", "full_last_layer": True},
        "value_embeddings": True,
        "residual_scalars": True,
    }
    model = tiny_model(dropout=0.1, num_layers=3, qk_norm=True, **switches).train()
    apply_precision(config.precision, model)
    parts: Any = Parts(torch.device("cpu"), None, None, model)  # type: ignore[arg-type]
    loss_of = training_loss(config, parts, config.precision.compile)
    torch.compiler.reset()
    counters.clear()
    # As in the loop: micro-batches are slices of a step's sequences, and the first one finds no gradients.
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            data = batch(seed, isolated, rows=4)
            for start in (0, 2):
                (loss_of(data.part(start, start + 2))["loss"] / 7).backward()
            model.zero_grad(set_to_none=True)
    assert counters["graph_break"] == {}
    assert counters["stats"]["unique_graphs"] == 2  # the step, and a chunk of its loss


@pytest.mark.parametrize("isolated", [False, True])
def test_checkpointing_changes_no_gradient(isolated: bool) -> None:
    plain = tiny_model(dropout=0.3).train()
    checkpointed = copy.deepcopy(plain)
    checkpoint_activations(checkpointed.layers)
    data = batch(0, isolated)
    results = [
        gradients(model, lambda x, m=model: language_modeling(m, x, 16), data) for model in (plain, checkpointed)
    ]
    assert results[0].keys() == results[1].keys() == dict(plain.named_parameters()).keys()
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name]), name
    assert checkpointed.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.slow
@torchs_own
def test_compiled_and_checkpointed_the_gradient_is_that_of_the_loss() -> None:
    """The gradient uses the dropout of its loss: checked by the slope, since compiled code draws other numbers."""
    model = tiny_model(dropout=0.3, num_layers=1).train()
    checkpoint_activations(model.layers)
    compiled = compile_step(lambda data: language_modeling(model, data, 64), checkpointed=True)
    data = batch(0, False)
    found = gradients(model, compiled, data)
    generator = torch.Generator().manual_seed(3)
    direction = {name: torch.randn(one.shape, generator=generator) for name, one in model.named_parameters()}

    def moved(by: float) -> float:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(by * direction[name])
        torch.manual_seed(5)
        return compiled(data).item()

    slope = (moved(1e-3) - moved(-2e-3)) / 2e-3
    assert sum((found[name] * direction[name]).sum().item() for name in found) == pytest.approx(slope, rel=5e-3)


def test_a_copy_of_a_checkpointed_model_is_a_model_of_its_own() -> None:
    model, tokens = tiny_model(), torch.arange(8)[None]
    checkpoint_activations(model.layers)
    other, expected = copy.deepcopy(model), model(tokens)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(other(tokens), expected)


def test_without_gradients_nothing_is_kept_or_computed_twice() -> None:
    model = Transformer(tiny_config())
    calls: list[int] = []
    model.layers[0].register_forward_pre_hook(lambda module, given: calls.append(1))
    checkpoint_activations(model.layers)
    with torch.inference_mode():
        model(torch.zeros(1, 4, dtype=torch.int64))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("device", "capability", "why"),
    [
        ("mps", None, "Apple's GPU is a prototype"),
        ("cuda", (6, 1), r"GeForce GTX 1080 \(compute capability 6.1\) is too old .* needs 7.0"),
    ],
)
def test_devices_without_a_compiler_are_named(
    device: str, capability: tuple[int, int] | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce GTX 1080")
    assert re.search(why, str(why_not_compiled(torch.device(device))))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert why_not_compiled(torch.device("cuda")) == why_not_compiled(torch.device("cpu"))
