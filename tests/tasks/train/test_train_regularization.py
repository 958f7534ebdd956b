"""EMA, embedding noise, early stopping and the best checkpoint, in the training loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded import rows
from safetensors.torch import load_file

from pretune.checkpoint import store as checkpoint
from pretune.core.config import ConfigError, InputError, validate
from pretune.dispatch import run
from pretune.memory.estimate import Footprint
from pretune.run.config import RunConfig
from pretune.tasks.train.running import Instruments, Run

Compose = Callable[..., dict[str, Any]]
PowerCut = Callable[..., None]
ALL_ON = ["ema.decay=0.9", "ema.evaluate_raw=true", "neftune_alpha=5", "model.dropout=0.1",
          "early_stopping.patience=3", "checkpoint.keep_best=true"]  # fmt: skip
# A learning rate at which a tiny model first gets better, then worse.
OVERFITS = ["optimizer.lr=0.1", "schedule=constant", "schedule.warmup=0", "budget.steps=400", "evaluation.every=2",
            "early_stopping.patience=2", "checkpoint.every=6"]  # fmt: skip


def val_losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["val/loss"] for row in rows(folder) if "val/loss" in row}


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def steps(folder: Path) -> list[int]:
    return sorted(checkpoint.step_of(path) for path in (folder / "checkpoints").iterdir())


def tensors(folder: Path, step: int, file: str = checkpoint.WEIGHTS) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step_{step:08d}" / file)


class Killed(Exception):
    """Simulates a power cut: nothing catches it."""


def test_averages_are_measured_kept_and_used(tiny: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mapping = tiny("name=one", "ema.decay=0.9", "ema.evaluate_raw=true", "optimizer.lr=1e-2")
    assert run(mapping) == 0
    folder = tmp_path / "runs" / "one"
    last = summary(folder)
    assert last["val/loss"] != last["val_raw/loss"]
    averages, raw = tensors(folder, 20), tensors(folder, 20, checkpoint.RAW)
    assert averages.keys() == raw.keys()
    assert all(not torch.equal(averages[name], raw[name]) for name in raw)
    # Evaluation and fine-tuning use the averaged weights.
    assert run({**mapping, "task": "evaluate"}) == 0
    evaluated = json.loads((folder / "evaluation.json").read_text())
    assert evaluated["val/loss"] == pytest.approx(last["val/loss"], abs=1e-6)
    tuned = tiny("name=tuned", "stage=finetune", "stage.init_from=one", "budget.steps=1", "model.dropout=0.1")
    assert run(tuned) == 0
    assert val_losses(tmp_path / "runs" / "tuned")[0] == pytest.approx(last["val/loss"], abs=1e-6)


def test_without_noise_and_averages_training_is_untouched(tiny: Compose, tmp_path: Path) -> None:
    for name, settings in (("plain", []), ("averaged", ["ema.decay=0.9"]), ("noisy", ["neftune_alpha=5"])):
        assert run(tiny(f"name={name}", "budget.steps=5", "log_every=1", *settings)) == 0
    losses = {
        name: [row["train/loss"] for row in rows(tmp_path / "runs" / name) if "train/loss" in row]
        for name in ("plain", "averaged", "noisy")
    }
    assert losses["averaged"] == losses["plain"] != losses["noisy"]
    first = {name: val_losses(tmp_path / "runs" / name)[0] for name in ("plain", "noisy")}
    assert first["noisy"] == first["plain"]  # evaluation has no noise


def test_an_early_stop_ends_the_run_as_complete(
    tiny: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mapping = tiny(
        "name=one", *OVERFITS, "checkpoint.keep_best=true", "checkpoint.keep=1", "report.after_training=true"
    )
    assert run(mapping) == 0
    said, folder = capsys.readouterr().out, tmp_path / "runs" / "one"
    losses, last = val_losses(folder), summary(folder)
    lowest = min(losses, key=losses.__getitem__)
    assert "stopped early at step" in said
    assert (last["stopped_early"], last["step"]) == (True, lowest + 4)
    assert (last["best_step"], last["best_val_loss"]) == (lowest, losses[lowest])
    assert steps(folder) == [lowest, lowest + 4]
    assert "best at step" in (folder / "report.md").read_text()
    # The run is complete, whatever is left of its budget.
    assert run(mapping) == 0
    assert "is complete" in capsys.readouterr().out

    # Other runs use its best checkpoint, or the one they ask for.
    def evaluated(use: str) -> float:
        config = tiny("name=one", *OVERFITS, "checkpoint.keep_best=true", f"checkpoint.use={use}", "task=evaluate")
        assert run(config) == 0
        return json.loads((folder / "evaluation.json").read_text())["val/loss"]

    assert evaluated("best") == pytest.approx(losses[lowest], abs=1e-6)
    assert evaluated("newest") == pytest.approx(losses[lowest + 4], abs=1e-6)
    assert evaluated(str(lowest)) == evaluated("best")
    with pytest.raises(InputError, match="has no checkpoint of step 7"):
        evaluated("7")
    for name, start, step in (
        ("a", "one", lowest),
        ("b", folder / "checkpoints" / f"step_{lowest + 4:08d}", lowest + 4),
    ):
        assert run(tiny(f"name={name}", "stage=finetune", f"stage.init_from={start}", "budget.steps=1")) == 0
        assert val_losses(tmp_path / "runs" / name)[0] == pytest.approx(losses[step], abs=1e-6)


def test_a_run_that_gets_better_to_its_end_does_not_stop_early(tiny: Compose, tmp_path: Path) -> None:
    assert run(tiny("name=one", "early_stopping.patience=1", "evaluation.every=5", "checkpoint.keep_best=true")) == 0
    folder = tmp_path / "runs" / "one"
    assert summary(folder)["stopped_early"] is False
    assert summary(folder)["best_step"] == 20
    assert steps(folder) == [15, 20]


@pytest.mark.parametrize(
    ("adapter", "compiled"),
    [("none", "false"), ("lora", "false"), pytest.param("none", "true", marks=pytest.mark.slow)],
)
def test_resumed_with_all_of_them_is_bit_for_bit_the_uninterrupted_run(
    adapter: str, compiled: str, tiny: Compose, power_cut: PowerCut, tmp_path: Path
) -> None:
    settings = [*ALL_ON, "evaluation.every=4", f"precision.compile={compiled}", "model.num_layers=1"]
    if adapter != "none":
        assert run(tiny("name=base", "budget.steps=3", "model.num_layers=1")) == 0
        settings += ["stage=finetune", "stage.init_from=base", f"adapter={adapter}", "adapter.dropout=0.1"]
    assert run(tiny("name=whole", *settings)) == 0
    power_cut(tiny("name=cut", *settings), 14)
    assert run(tiny("name=cut", *settings)) == 0
    whole, cut = tmp_path / "runs" / "whole", tmp_path / "runs" / "cut"
    names = ("step", "train/loss", "val/loss", "val_raw/loss")
    assert [[row.get(name) for name in names] for row in rows(cut)] == [
        [row.get(name) for name in names] for row in rows(whole)
    ]
    assert steps(cut) == steps(whole)
    for path in (whole / "checkpoints").glob("*/*.safetensors"):
        ours, theirs = load_file(cut / path.relative_to(whole)), load_file(path)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), path
    assert {path.name for path in (whole / "checkpoints" / "step_00000020").iterdir()} >= {checkpoint.RAW}


def test_a_power_cut_between_evaluation_and_end_still_ends_early(tiny: Compose, tmp_path: Path) -> None:
    mapping, folder = tiny("name=one", *OVERFITS), tmp_path / "runs" / "one"

    def cut(training: Run, _: object) -> None:
        if training.state.finished and training.saved:
            raise Killed

    with pytest.raises(Killed):
        run(mapping, Instruments(on_begin=cut))
    assert not (folder / "summary.json").exists()
    end = max(steps(folder))
    assert run(mapping) == 0
    assert (summary(folder)["step"], summary(folder)["stopped_early"]) == (end, True)


def test_patience_needs_evaluations_and_fixes_when_they_are(tiny: Compose, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"early_stopping\.patience counts evaluations"):
        run(tiny("name=one", "early_stopping.patience=2", "evaluation.every=null"))
    assert run(tiny("name=one", "early_stopping.patience=9", "budget.steps=2")) == 0
    with pytest.raises(ConfigError, match=r"evaluation\.every: 10 -> 5"):
        run(tiny("name=one", "early_stopping.patience=9", "budget.steps=2", "evaluation.every=5"))


def test_averages_count_as_memory(tiny: Compose) -> None:
    plain, averaged = (
        Footprint(validate(RunConfig, tiny("name=one", *settings))) for settings in ((), ("ema.decay=0.9",))
    )
    assert averaged.averages == plain.gradients > 0
    assert averaged.constant == plain.constant + averaged.averages
    assert averaged.peak(2) == plain.peak(2) + averaged.averages
    assert sum(averaged.parts(2).values()) == averaged.peak(2)
