"""8-bit matrix products, rounded as in hardware and multiplied on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import nn
from torchao.float8.float8_linear import Float8Linear

from pretune.compute.precision import check_float8, use_float8
from pretune.core.batch import Batch
from pretune.core.config import ConfigError, validate
from pretune.dispatch import run
from pretune.model.transformer import Transformer
from pretune.objectives.language_modeling import language_modeling
from pretune.optim.groups import trained_parameters
from pretune.run.config import RunConfig

Compose = Callable[..., dict[str, Any]]
CPU = torch.device("cpu")


def batch() -> Batch:
    tokens = torch.randint(0, 61, (2, 33), generator=torch.Generator().manual_seed(1))
    return Batch(tokens[:, :-1], tokens[:, 1:], None)


def trained(model: Transformer) -> tuple[float, torch.Tensor]:
    loss = language_modeling(model, batch(), 1000)
    loss.backward()
    return loss.item(), torch.cat(
        [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    )


def test_the_linear_layers_inside_the_blocks_are_converted_and_nothing_else_changes() -> None:
    model = tiny_model(tied_embeddings=False)
    before, roles = dict(model.named_parameters()), [(one.name, one.role) for one in trained_parameters(model)]
    use_float8(model, emulate=True)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert len(linear) == 1 + 2 * 4
    assert all(isinstance(module, Float8Linear) == name.startswith("layers.") for name, module in linear.items())
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == {
        name: id(parameter) for name, parameter in before.items()
    }
    assert [(one.name, one.role) for one in trained_parameters(model)] == roles


def test_loss_and_gradients_are_off_by_rounding_alone() -> None:
    exact, rounded = tiny_model(), tiny_model()
    use_float8(rounded, emulate=True)
    (loss, gradient), (loss_8, gradient_8) = trained(exact), trained(rounded)
    assert loss_8 != loss
    assert loss_8 == pytest.approx(loss, rel=0.02)
    assert torch.cosine_similarity(gradient, gradient_8, dim=0) > 0.9  # gradients have two bits of mantissa


def test_layers_that_do_not_fit_are_left_alone() -> None:
    model = tiny_model(mlp_dim=40)
    use_float8(model, emulate=True)
    assert not isinstance(model.get_submodule("layers.0.mlp.down"), Float8Linear)
    assert isinstance(model.get_submodule("layers.0.attention.qkv"), Float8Linear)
    with pytest.raises(ConfigError, match="multiples of 16"):
        use_float8(tiny_model(dim=24, mlp_dim=40), emulate=True)


def test_hardware_without_it_is_named(tiny: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    config = validate(RunConfig, tiny("precision=fp8"))
    with pytest.raises(ConfigError, match=r"this machine's cpu has no 8-bit .* precision=fp32"):
        check_float8(config.precision, CPU, "fp32")
    check_float8(validate(RunConfig, tiny("precision=bf16")).precision, CPU, "fp32")
    # What torch reports for an A100 and an L4.
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"NVIDIA A100-SXM4-40GB \(compute capability 8.0\)"):
        check_float8(config.precision, torch.device("cuda"), "bf16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    check_float8(config.precision, torch.device("cuda"), "bf16")
    # An MI250 reports itself as 9.0, like an H100.
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for name, has_it in (("gfx90a:sramecc+", False), ("gfx942:sramecc+", True)):
        properties = SimpleNamespace(gcnArchName=name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        with nullcontext() if has_it else pytest.raises(ConfigError, match="8-bit"):
            check_float8(config.precision, torch.device("cuda"), "bf16")


def test_it_is_refused_before_anything_is_read_or_written(tiny: Compose) -> None:
    mapping = tiny("precision=fp8", "device=cpu")
    mapping["data"]["source"]["files"] = ["absent.jsonl"]
    with pytest.raises(ConfigError, match="precision=fp8: this machine's cpu"):
        run(mapping)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler does what it deprecates
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_trains_evaluates_and_writes(tiny: Compose, monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    mapping = tiny(
        "precision=fp8",
        "precision.emulate=true",
        f"precision.compile={compiled}",
        "budget.steps=20",
        "optimizer.lr=0.01",
    )
    assert run(mapping) == 0
    in_16_bits = tiny("precision=bf16", "precision.compile=false", "budget.steps=20", "optimizer.lr=0.01", "name=bf16")
    assert run(in_16_bits) == 0
    folder = Path(mapping["output_dir"]) / mapping["name"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["val/loss"] for row in rows if "val/loss" in row]
    assert losses[-1] < losses[0] - 1
    other = [json.loads(line) for line in (folder.parent / "bf16" / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(other[0]["val/loss"], rel=0.02)
    assert losses[0] != pytest.approx(other[0]["val/loss"], rel=1e-6)  # the same weights, rounded to other values
    assert json.loads((folder / "samples.jsonl").read_text().splitlines()[-1])["text"]
    assert run(mapping | {"task": "evaluate"}) == 0
    # With the same weights, but in bfloat16.
    assert json.loads((folder / "evaluation.json").read_text())["val/loss"] == pytest.approx(losses[-1], rel=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("adapter=lora", "stage.init_from=base"), "does not work with adapter=lora"),
        (("precision=bf16", "precision.emulate=true"), "add precision=fp8"),
        (("data.sequence_length=31", "batch.micro_batch=1", "batch.tokens=248"), "multiple of 16 tokens"),
    ],
)
def test_what_does_not_go_together_is_refused(tiny: Compose, changes: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(RunConfig, tiny("precision=fp8", *changes))
