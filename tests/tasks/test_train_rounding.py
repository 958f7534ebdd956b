"""Quantization-aware training: what is measured, saved, converted and used is the trained model, rounded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pretune.run import run

Compose = Callable[..., dict[str, Any]]
QAT = ("quantization=qat_int8_int4", "quantization.group_size=16")
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
        ("averaging.decay=0.9", "optimizer=muon", "precision=bf16", "precision.compile=false"),
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
    # The checkpoint is an ordinary one: another run starts from it, with all its bits.
    plain = [option for option in more if "quantization" not in option]
    run(tiny("name=after", "stage=finetune", "stage.init_from=qat", "budget.steps=1", *plain))
    assert rows(tmp_path / "runs" / "after", "val/loss")[0] == pytest.approx(figures["val_float/loss"], abs=1e-3)
