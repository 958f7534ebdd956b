"""A budget in seconds, whatever is done to the clock."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recorded import rows

from pretune.dispatch import run
from pretune.optim.budget import Step
from pretune.tasks.train.running import Instruments, Run
from pretune.training.signals import EXIT_STOPPED

Compose = Callable[..., dict[str, Any]]
TIMED = ("name=a", "tracker=none", "budget.steps=null", "log_every=1", "samples.prompts=[]", "evaluation.every=5")


def instruments(start: float, at: dict[int, Callable[[], float]]) -> Instruments:
    """A clock that begins at `start`, and which steps move by a second each; or by what `at` says of one of them."""
    now = start

    def begin(training: Run, what: object) -> None:
        nonlocal now
        if isinstance(what, Step):
            now += at.get(training.state.step + 1, lambda: 1.0)()

    return Instruments(lambda: now, lambda device, precisions: 1e12, begin)


def stop() -> float:
    os.kill(os.getpid(), signal.SIGTERM)
    return 1.0


def test_a_clock_that_is_set_back_costs_the_time_of_a_step(tiny: Compose, tmp_path: Path) -> None:
    """The budget ends with its schedule, and a resumed run goes on with the seconds that it had."""
    mapping = tiny(*TIMED, "budget.time=20s", "schedule=linear")
    assert run(mapping, instruments(1e9, {5: lambda: -1e6, 9: stop})) == EXIT_STOPPED
    assert run(mapping, instruments(-1e9, {13: lambda: -3600.0})) == 0
    summary = json.loads((tmp_path / "runs" / "a" / "summary.json").read_text())
    assert (summary["seconds"], summary["step"], summary["train/lr"]) == (20, 22, 0)
    assert min(summary[name] for name in summary if name.startswith("time/")) == 0
    speeds = {row["step"]: row["train/tokens_per_second"] for row in rows(tmp_path / "runs" / "a") if "train/lr" in row}
    assert {step for step, speed in speeds.items() if speed is None} == {5, 13}
    assert set(speeds.values()) == {None, 256}


def test_setting_the_computers_clock_back_does_not_lengthen_a_run(
    tiny: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.time()
    monkeypatch.setattr(time, "time", lambda: began - 3600 * time.perf_counter())
    assert run(tiny(*TIMED, "budget.time=0.3s", "evaluation.every=null")) == 0
    assert rows(tmp_path / "runs" / "a")[-1]["seconds"] == pytest.approx(0.3, rel=0.9)
