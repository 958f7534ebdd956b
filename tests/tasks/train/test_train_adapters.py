"""Runs that train an adapter: saving, resuming, and using the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pretune.checkpoint.store import save
from pretune.core.config import ConfigError, InputError, validate
from pretune.dispatch import run
from pretune.optim.optimizers import build_optimizer
from pretune.run.config import RunConfig
from pretune.run.folder import RunFolder
from pretune.run.model import merged_model

Compose = Callable[..., dict[str, Any]]
PowerCut = Callable[..., None]
BASE = ("name=base", "budget.steps=4")
TUNE = ("stage=finetune", "stage.init_from=base", "budget.steps=6", "adapter.rank=4", "optimizer.lr=1e-2")


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step:08d}"


def figures(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["val/loss"] for row in rows if "val/loss" in row]


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_an_adapter_is_trained_saved_alone_and_merged_for_everything_after(
    kind: str, tiny: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    run(tiny(*BASE))
    run(tiny("name=tuned", *TUNE, f"adapter={kind}"))
    assert "trained, " in capsys.readouterr().out
    saved = checkpoint(runs / "tuned", 6)
    assert {file.name for file in saved.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "optimizer.safetensors",
        "state.json",
    }
    tensors = load_file(saved / "adapter_model.safetensors")
    assert figures(runs / "tuned")["trainable_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    first, last = losses(runs / "tuned")[0], losses(runs / "tuned")[-1]
    assert first == pytest.approx(losses(runs / "base")[-1], abs=1e-6)
    assert last < first
    # A run that starts from it gets the merged weights: it begins where this one ended, and is a plain run.
    run(tiny("name=after", "stage=finetune", "stage.init_from=tuned", "budget.steps=1"))
    assert losses(runs / "after")[0] == pytest.approx(last, abs=1e-6)
    assert (checkpoint(runs / "after", 1) / "model.safetensors").is_file()
    run(tiny("name=tuned", *TUNE, f"adapter={kind}", "task=generate", "generate.prompt=The"))


def test_resumed_is_bit_for_bit_the_uninterrupted_run(tiny: Compose, tmp_path: Path, power_cut: PowerCut) -> None:
    runs = tmp_path / "runs"
    run(tiny(*BASE))
    settings = (*TUNE, "adapter=lora", "adapter.init=pissa", "adapter.dropout=0.1", "checkpoint.every=2",
                "precision=bf16")  # fmt: skip
    run(tiny("name=whole", *settings))
    power_cut(tiny("name=cut", *settings), 4)
    run(tiny("name=cut", *settings))
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        whole, cut_ = (load_file(checkpoint(runs / name, 6) / file) for name in ("whole", "cut"))
        assert whole.keys() == cut_.keys()
        assert all(torch.equal(whole[name], cut_[name]) for name in whole)


def test_going_on_from_an_adapter(tiny: Compose, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    run(tiny(*BASE))
    run(tiny("name=first", *TUNE, "adapter=lora"))
    run(tiny("name=second", *TUNE, "adapter=lora", "adapter.init_from=first"))
    assert losses(runs / "second")[0] == pytest.approx(losses(runs / "first")[-1], abs=1e-6)
    folder = checkpoint(runs / "first", 6)
    run(tiny("name=third", *TUNE, "adapter=lora", f"adapter.init_from={folder}"))
    assert losses(runs / "third") == losses(runs / "second")
    with pytest.raises(InputError, match="has r = 4"):
        run(tiny("name=fourth", *TUNE, "adapter=lora", "adapter.rank=2", "adapter.init_from=first"))
    run(tiny("name=other", "budget.steps=4", "seed=7"))
    with pytest.raises(InputError, match="trained on other weights"):
        run(tiny("name=fifth", *TUNE, "adapter=lora", "stage.init_from=other", "adapter.init_from=first"))
    assert not (runs / "fifth").exists()


def test_lora_plus_reaches_the_optimizer(tiny: Compose, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    run(tiny(*BASE))
    once = (*TUNE, "adapter=lora", "budget.steps=1", "schedule=constant")
    for name, ratio in (("plain", 1), ("plus", 16)):
        run(tiny(f"name={name}", *once, f"adapter.lr_ratio={ratio}"))
    plain, plus = (load_file(checkpoint(runs / name, 1) / "adapter_model.safetensors") for name in ("plain", "plus"))
    for name, tensor in plain.items():
        # One step of AdamW from zero moves every value by the learning rate.
        torch.testing.assert_close(plus[name], tensor * (16 if "lora_B" in name else 1), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("adapter.targets=[q_proj]",), "matches no linear layer"),
        (("adapter.rank=0",), r"adapter\.rank"),
        (("stage=pretrain", "stage.init_from=null"), "set stage.init_from"),
        (("adapter.lr_ratio=4", "optimizer=muon"), r"does not support adapter\.lr_ratio; set it to 1"),
    ],
)
def test_what_is_refused_before_anything_is_written(
    overrides: tuple[str, ...], message: str, tiny: Compose, tmp_path: Path
) -> None:
    run(tiny(*BASE))
    with pytest.raises(ConfigError, match=message):
        run(tiny("name=bad", *TUNE, "adapter=lora", *overrides))
    assert not (tmp_path / "runs" / "bad").exists()


def test_an_adapter_without_a_gradient_is_an_error(tiny: Compose, tmp_path: Path) -> None:
    mapping = tiny(*BASE)
    run(mapping)
    # A checkpoint with a layer of zeros in the place of the run's.
    config = validate(RunConfig, mapping)
    model = merged_model(config, RunFolder(tmp_path / "runs" / "base"), torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.layers[0].get_submodule("mlp").parameters():
            parameter.zero_()
    save(tmp_path / "runs" / "base" / "checkpoints", 4, model, build_optimizer(config.optimizer, model), {}, None)
    with pytest.raises(ConfigError, match=r"2 of 4 adapters got no gradient .* layers\.0\.mlp"):
        run(tiny("name=idle", *TUNE, "adapter=lora", "adapter.targets=[mlp]"))
