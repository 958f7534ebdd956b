"""Runs that train an adapter on 4-bit weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from pretune.core.config import ConfigError, validate
from pretune.dispatch import run
from pretune.run.config import RunConfig
from pretune.run.model import training_model

Compose = Callable[..., dict[str, Any]]
PowerCut = Callable[..., None]
BASE = ("name=base", "budget.steps=4")
TUNE = ("stage=finetune", "stage.init_from=base", "budget.steps=6", "adapter.rank=2", "optimizer.lr=1e-2")
QLORA = ("quantization=qlora_nf4", "quantization.block_size=16")


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["val/loss"] for row in rows if "val/loss" in row]


def adapter_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step_{step:08d}" / "adapter_model.safetensors")


@pytest.mark.parametrize("adapter", [("adapter=lora",), ("adapter=lora", "adapter.init=pissa"), ("adapter=dora",)])
def test_what_was_trained_is_what_is_measured_started_from_and_exported(
    adapter: tuple[str, ...], tiny: Compose, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    run(tiny(*BASE))
    settings = ("name=tuned", *TUNE, *adapter, *QLORA)
    run(tiny(*settings))
    saved = {file.name for file in (runs / "tuned" / "checkpoints" / "step_00000006").iterdir()}
    assert "adapter_model.safetensors" in saved
    assert "model.safetensors" not in saved
    first, last = losses(runs / "tuned")[0], losses(runs / "tuned")[-1]
    assert last < first
    assert first == pytest.approx(losses(runs / "base")[-1], abs=0.1)
    # Merged into the dequantized weights, it is the model of training.
    run(tiny("name=after", "stage=finetune", "stage.init_from=tuned", "budget.steps=1"))
    assert losses(runs / "after")[0] == pytest.approx(last, abs=1e-6)
    run(tiny(*settings, "task=export"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        runs / "tuned" / "export" / "huggingface-step_00000006"
    ).eval()
    config = validate(RunConfig, tiny(*settings))
    model = training_model(config, torch.device("cpu"))
    from pretune.adapters.files import load_adapter

    load_adapter(runs / "tuned" / "checkpoints" / "step_00000006", model)
    tokens = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model.eval().unembed(model(tokens)), rtol=1e-5, atol=1e-5)


def test_it_goes_on_bit_for_bit(tiny: Compose, tmp_path: Path, power_cut: PowerCut) -> None:
    runs = tmp_path / "runs"
    run(tiny(*BASE))
    settings = (*TUNE, "adapter=lora", *QLORA, "checkpoint.every=3", "precision=bf16")
    run(tiny("name=whole", *settings))
    power_cut(tiny("name=cut", *settings), 5)
    run(tiny("name=cut", *settings))
    whole, again = adapter_of(runs / "whole", 6), adapter_of(runs / "cut", 6)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("adapter=none", "quantization=qlora_nf4"), "choose adapter=lora"),
        (("adapter=dora", "adapter.dropout=0.1", *QLORA), r"set adapter\.dropout=0\.0"),
        (("adapter=lora", "quantization=qlora_nf4", "quantization.block_size=63"), "multiple of 2"),
        (
            ("adapter=lora", "quantization=qlora_nf4", "quantization.block_size=1000"),
            r"layers\.0\.\S+ has .* not a multiple of quantization\.block_size=1000",
        ),
    ],
)
def test_what_is_refused_before_anything_is_written(
    overrides: tuple[str, ...], message: str, tiny: Compose, tmp_path: Path
) -> None:
    run(tiny(*BASE))
    tune = [one for one in TUNE if overrides[0] != "adapter=none" or not one.startswith("adapter")]
    with pytest.raises(ConfigError, match=message):
        run(tiny("name=bad", *tune, *overrides))
    assert not (tmp_path / "runs" / "bad").exists()
