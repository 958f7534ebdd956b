"""A stopped run resumes where it was: 20 steps = 10 + stop + 10, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded import losses, weights
from resumed import resumed_state

from pretune.core.config import ConfigError
from pretune.dispatch import run
from pretune.launch.groups import options
from pretune.run.folder import write_config

ROOT = Path(__file__).parent.parent
Compose = Callable[..., dict[str, Any]]
PowerCut = Callable[..., None]


NORMUON = ["optimizer.neuron_beta=0.95", "optimizer.cautious_decay=true", "optimizer.momentum_warmup=0.7"]
WARMUP = ["batch.warmup={start: 64, over: 3000}", "batch.micro_batch=2", "optimizer.weight_decay_final=0.2"]


RESUMED = [
    pytest.param("adamw", ["precision=bf16"], id="adamw"),
    pytest.param("adamw", WARMUP, id="adamw-warmup"),
    pytest.param("lion", [], id="lion"),
    pytest.param("muon", [], id="muon"),
    pytest.param("muon", NORMUON, id="normuon"),
    pytest.param("adamw_8bit", ["model.vocab_size=512"], marks=pytest.mark.slow, id="adamw_8bit"),
]


def test_every_optimizer_is_resumed_below() -> None:
    assert {parameters.values[0] for parameters in RESUMED} == set(options("optimizer"))


@pytest.mark.parametrize(("optimizer", "more"), RESUMED)
def test_resumed_is_bit_for_bit_the_uninterrupted_run(
    optimizer: str, more: list[str], tiny: Compose, power_cut: PowerCut, tmp_path: Path
) -> None:
    settings = [f"optimizer={optimizer}", "model.dropout=0.1", "budget.steps=20", "optimizer.lr=1e-3", *more]
    state = resumed_state(tiny, power_cut, tmp_path / "runs", *settings)
    assert any(name.endswith(":codes") for name in state) == (optimizer == "adamw_8bit")


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT])
def test_a_signal_saves_everything_and_the_same_command_goes_on(
    number: signal.Signals, tiny: Compose, power_cut: PowerCut, tmp_path: Path
) -> None:
    settings = ["model.dropout=0.1", "budget.steps=2000", "checkpoint.every=null", "evaluation.every=7"]
    write_config(tmp_path / "config.yaml", tiny("name=stopped", *settings))
    command = [sys.executable, str(ROOT / "src" / "main.py"), "--config", str(tmp_path / "config.yaml")]
    folder = tmp_path / "runs" / "stopped"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ})
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not metrics.exists() or metrics.read_text().count("\n") < 4):
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "run the same command to resume" in output
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert len(saved) == 1
    step = int(saved[0].removeprefix("step_"))
    assert 0 < step < 2000

    # An uninterrupted run with the same settings passes through the same state.
    reference = tiny("name=reference", *settings, "checkpoint.every=1", "checkpoint.keep=null")
    power_cut(reference, step + 1)
    a, b = weights(folder, step), weights(tmp_path / "runs" / "reference", step)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_finished_run_says_so_and_changes_nothing(
    tiny: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny("name=done", "budget.steps=2")) == 0
    folder = tmp_path / "runs" / "done"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    assert run(tiny("name=done", "budget.steps=2")) == 0
    assert "is complete" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_changed_config_is_refused_with_the_keys_that_differ(tiny: Compose, tmp_path: Path) -> None:
    assert run(tiny("name=mine", "budget.steps=2")) == 0
    before = (tmp_path / "runs" / "mine" / "config.yaml").read_text()
    with pytest.raises(ConfigError) as caught:
        run(tiny("name=mine", "budget.steps=3", "optimizer.lr=5e-4"))
    assert "budget.steps: 2 -> 3" in str(caught.value)
    assert "optimizer.lr: 0.003 -> 0.0005" in str(caught.value)
    assert (tmp_path / "runs" / "mine" / "config.yaml").read_text() == before


def test_resume_must_and_never(tiny: Compose, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        run(tiny("name=none", "resume=must"))
    assert not (tmp_path / "runs").exists()
    assert run(tiny("name=one", "budget.steps=1", "resume=never")) == 0
    with pytest.raises(ConfigError, match="already holds a run"):
        run(tiny("name=one", "budget.steps=1", "resume=never"))


def test_the_saved_config_is_itself_a_config(tiny: Compose, tmp_path: Path) -> None:
    assert run(tiny("name=first", "budget.steps=2")) == 0
    config = tmp_path / "runs" / "first" / "config.yaml"
    command = [sys.executable, str(ROOT / "src" / "main.py"), "--config", str(config), "name=second"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    runs = tmp_path / "runs"
    assert losses(runs / "first") == losses(runs / "second")
