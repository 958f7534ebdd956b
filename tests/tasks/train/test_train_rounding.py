"""Quantization-aware training: the quantized model is what is measured, saved, converted and used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pretune.core.config import ConfigError, validate
from pretune.dispatch import run
from pretune.run.config import RunConfig
from pretune.run.folder import find_run
from pretune.run.model import converted_model, evaluation_model

Compose = Callable[..., dict[str, Any]]
PowerCut = Callable[..., None]
QAT = ("quantization=qat_int8_int4", "quantization.group_size=16", "quantization.start=0.0")
BASE = ("name=base", "budget.steps=4")
TUNE = ("stage=finetune", "stage.init_from=base", "budget.steps=6", "optimizer.lr=1e-2")
CPU = torch.device("cpu")


def rows(folder: Path, figure: str) -> list[float]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[figure] for row in found if figure in row]


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("model.tied_embeddings=false", "model.value_embeddings=true", "quantization.embedding=int8"),
        ("ema.decay=0.9", "optimizer=muon", "precision=bf16", "precision.compile=false"),
    ],
    ids=["tied", "untied", "averaged"],
)
def test_what_is_converted_is_what_was_trained(more: tuple[str, ...], tiny: Compose, tmp_path: Path) -> None:
    folder, settings = tmp_path / "runs" / "qat", ("name=qat", "budget.steps=6", "optimizer.lr=1e-2", *QAT, *more)
    assert run(tiny(*settings)) == 0
    figures = summary(folder)
    assert rows(folder, "val/loss")[-1] < rows(folder, "val/loss")[0] - 0.1
    assert figures["converted/loss"] == pytest.approx(figures["val/loss"], abs=1e-3)
    assert figures["val_float/loss"] != figures["val/loss"]
    assert run(tiny(*settings, "task=evaluate")) == 0
    evaluated = json.loads((folder / "evaluation.json").read_text())
    assert evaluated["val/loss"] == pytest.approx(figures["val/loss"], abs=1e-3)
    # The checkpoint is an ordinary one: another run can start from it in full precision.
    plain = [option for option in more if "quantization" not in option]
    run(tiny("name=after", "stage=finetune", "stage.init_from=qat", "budget.steps=1", *plain))
    assert rows(tmp_path / "runs" / "after", "val/loss")[0] == pytest.approx(figures["val_float/loss"], abs=1e-3)


def test_rounding_begins_within_the_budget_and_goes_on_bit_for_bit(
    tiny: Compose, tmp_path: Path, power_cut: PowerCut
) -> None:
    plain = ("budget.steps=8", "optimizer.lr=1e-2", "checkpoint.every=2")
    settings = (*plain, *QAT, "quantization.start=0.5")
    run(tiny("name=whole", *settings))
    run(tiny("name=never", *plain))
    same = weights(tmp_path / "runs" / "whole", 6), weights(tmp_path / "runs" / "never", 6)
    assert not all(torch.equal(same[0][name], same[1][name]) for name in same[0])
    power_cut(tiny("name=cut", *settings), 8)
    run(tiny("name=cut", *settings))
    whole, gone_on = (weights(tmp_path / "runs" / name, 8) for name in ("whole", "cut"))
    assert all(torch.equal(tensor, gone_on[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("adapter", ["lora", "dora", "lokr"])
def test_an_adapter_is_trained_under_the_rounding_that_it_is_merged_into(
    adapter: str, tiny: Compose, tmp_path: Path
) -> None:
    run(tiny(*BASE))
    settings = ("name=tuned", *TUNE, f"adapter={adapter}", "adapter.dropout=0.0", "adapter.rank=2", *QAT)
    run(tiny(*settings))
    folder = tmp_path / "runs" / "tuned"
    figures = summary(folder)
    assert rows(folder, "val/loss")[-1] < rows(folder, "val/loss")[0]
    assert abs(figures["converted/difference"]) < 1e-4
    assert {file.name for file in (folder / "checkpoints" / "step_00000006").iterdir()} >= {"adapter_model.safetensors"}
    assert not (folder / "checkpoints" / "step_00000006" / "model.safetensors").exists()


def numbers(folder: Path, name: str) -> torch.Tensor:
    """The values of an exported matrix, read as docs/how-to/quantization.md describes."""
    file, index = load_file(folder / "model.safetensors"), json.loads((folder / "integers.json").read_text())
    integers, scales = file[f"{name}.integers"], file[f"{name}.scales"].float()
    if index["matrices"][name]["bits"] == 4:
        integers = torch.stack((integers & 15, integers >> 4), dim=-1).flatten(-2).float() - 8
    return (integers.float().unflatten(-1, (scales.shape[-1], -1)) * scales[..., None]).flatten(-2)


def test_what_is_exported_is_the_trained_model_and_not_the_one_before(tiny: Compose, tmp_path: Path) -> None:
    run(tiny(*BASE))
    settings = ("name=tuned", *TUNE, *QAT, "quantization.head=int8", "model.tied_embeddings=true")
    run(tiny(*settings))
    run(tiny(*settings, "task=export", "export.format=integers"))
    folder = tmp_path / "runs" / "tuned"
    (exported,) = (folder / "export").iterdir()
    config = validate(RunConfig, tiny(*settings))
    converted = converted_model(config, find_run("tuned", config.output_dir), CPU)
    before = weights(tmp_path / "runs" / "base", 4)
    trained = weights(folder, 6)
    for name in ("embedding.weight", "layers.0.attention.qkv.weight", "layers.1.mlp.down.weight"):
        found, stored = numbers(exported, name), converted.get_parameter(name).data
        assert torch.equal(found, stored.dequantize())  # pyright: ignore
        assert (found - trained[name]).norm() < 0.2 * trained[name].norm()
        assert (found - trained[name]).norm() < 0.5 * (found - before[name]).norm()
    cost = json.loads((exported / "quantization.json").read_text())
    assert cost["val/loss"] == pytest.approx(summary(folder)["converted/loss"], abs=1e-3)
    assert cost["val_float/loss"] == pytest.approx(summary(folder)["val_float/loss"], abs=1e-3)
    floats = sum(tensor.numel() for tensor in trained.values() if tensor.ndim == 2)
    assert (exported / "model.safetensors").stat().st_size < 0.75 * floats + 20_000


@pytest.mark.parametrize("kind", ["int8_weight_only", "int4_weight_only", "int8_int4"])
def test_a_plain_run_is_measured_and_exported_rounded(kind: str, tiny: Compose, tmp_path: Path) -> None:
    run(tiny(*BASE))
    rounding = (f"quantization={kind}", "quantization.group_size=16")
    run(tiny(*BASE, *rounding, "task=evaluate"))
    folder = tmp_path / "runs" / "base"
    evaluated = json.loads((folder / "evaluation.json").read_text())
    run(tiny(*BASE, *rounding, "task=export"))
    exported = folder / "export" / f"huggingface-{kind}-step_00000004"
    cost = json.loads((exported / "quantization.json").read_text())
    assert cost["val/loss"] == evaluated["val/loss"] != cost["val_float/loss"]
    assert cost["val_float/loss"] == pytest.approx(summary(folder)["val/loss"], abs=1e-6)
    assert run(tiny(*BASE, *rounding, "task=generate", "generate.prompt=The cat", "generate.max_new_tokens=4")) == 0
    model = evaluation_model(
        validate(RunConfig, tiny(*BASE, *rounding, "task=generate")), find_run("base", str(folder.parent)), CPU
    )
    stored = load_file(exported / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(stored, model.get_parameter("embedding.weight")[: len(stored)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("quantization=int8_int4", "quantization.group_size=16"),
            r"is applied after training: train with quantization=none",
        ),
        (
            (*QAT, "quantization.group_size=32"),
            r"group_size \(32\) does not divide the 48 inputs of the layer mlp\.down",
        ),
        ((*QAT, "precision=fp8"), r"and precision=fp8 round to different values"),
        ((*QAT, *TUNE, "adapter=lora", "adapter.dropout=0.1"), r"set adapter\.dropout=0\.0"),
        (("task=export", "export.format=integers"), r"choose how to store weights"),
        (("task=export", *QAT, "export.adapter=keep", "adapter=lora", *TUNE), r"use export\.adapter=merge"),
    ],
)
def test_what_cannot_be_rounded_is_one_line(settings: tuple[str, ...], message: str, tiny: Compose) -> None:
    if settings[0] == "task=export":
        run(tiny(*BASE))
        run(tiny("name=tuned", *TUNE, "adapter=lora", "adapter.rank=2"))
        settings = ("name=tuned", *settings)
    with pytest.raises(ConfigError, match=message) as caught:
        run(tiny(*settings))
    assert "\n" not in str(caught.value)


def test_weights_of_4_bits_are_not_rounded_again(tiny: Compose) -> None:
    run(tiny(*BASE))
    run(tiny("name=qlora", *TUNE, "adapter=lora", "quantization=qlora_nf4", "quantization.block_size=16"))
    with pytest.raises(ConfigError, match=r"already quantized to 4 bits .*second time"):
        run(tiny("name=again", "stage=finetune", "stage.init_from=qlora", "budget.steps=1", *QAT))
