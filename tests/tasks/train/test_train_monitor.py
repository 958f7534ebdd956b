"""Messages of a run: small budgets, shared cores, implausible figures, and the last compile time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from pretune.compute.threads import CoreShare
from pretune.core.batch import Batch
from pretune.core.config import validate
from pretune.dispatch import run
from pretune.run.config import RunConfig
from pretune.tasks.train.compilation import Compilation, CompileTimes
from pretune.tasks.train.monitor import Monitor
from pretune.tasks.train.state import TrainingState
from pretune.training.meter import Window

Compose = Callable[..., dict[str, Any]]
CPU = torch.device("cpu")


def said(config: RunConfig, seconds_a_step: float, steps: int = 3, device: torch.device = CPU) -> str:
    """All messages over the first steps of a run."""
    state, tokens = TrainingState({}, None, ""), config.batch.tokens
    watch, lines = Monitor(config, device, state), []
    for _ in range(steps):
        state.step, state.seconds = state.step + 1, state.seconds + seconds_a_step
        state.token_seconds = [*state.token_seconds, seconds_a_step / tokens]
        lines += watch.warnings(state)
    return "\n".join(lines)


def timed(tiny: Compose, *overrides: str) -> RunConfig:
    return validate(RunConfig, tiny("budget.steps=null", "budget.time=3m", *overrides))


def test_a_budget_that_buys_nothing_is_said_after_the_first_slow_step(tiny: Compose) -> None:
    lines = said(timed(tiny, "precision=bf16"), 36.0, steps=1)
    assert "at 36 s per step the budget of 180 s is enough for about 5 steps" in lines
    assert "budget.time, a smaller model, or fewer batch.tokens; precision is bf16 now" in lines
    assert "precision" not in said(timed(tiny, "precision=fp32"), 36.0)


@pytest.mark.parametrize(
    ("overrides", "seconds"),
    [((), 1.5), (("budget.steps=3",), 36.0), (("budget.tokens=512",), 36.0)],
    ids=["120 steps", "steps end it sooner", "tokens end it sooner"],
)
def test_other_budgets_are_left_in_peace(overrides: tuple[str, ...], seconds: float, tiny: Compose) -> None:
    assert "budget" not in said(timed(tiny, *overrides), seconds)


def test_it_is_said_once(tiny: Compose) -> None:
    assert said(timed(tiny), 36.0, steps=5).count("budget of") == 1


class FakeThreads:
    """A fake proc/self/task of two threads, which have run and waited for the given times."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def have(self, ran: float, waited: float) -> None:
        for name in ("1", "2"):
            (self.root / name).mkdir(exist_ok=True)
            (self.root / name / "schedstat").write_text(f"{int(ran / 2 * 1e9)} {int(waited / 2 * 1e9)} 99\n")


def test_cores_that_others_use_are_noticed(tiny: Compose, tmp_path: Path) -> None:
    fake = FakeThreads(tmp_path)
    config = timed(tiny)
    for waited, expected in ((28.0, True), (1.0, False)):
        fake.have(100.0, 100.0)
        watch = Monitor(config, CPU, TrainingState({}, None, ""), CoreShare(tmp_path))
        state = TrainingState({}, None, "", step=9, seconds=6.0)
        fake.have(114.0, 100.0 + waited)
        line = "".join(watch.warnings(state))
        assert ("other processes use these cores" in line) == expected
        assert ("33% of the time" in line) == expected
        assert "".join(watch.warnings(state)) == ""


def test_on_a_gpu_the_cores_may_idle(tiny: Compose, tmp_path: Path) -> None:
    fake = FakeThreads(tmp_path)
    fake.have(1.0, 1.0)
    watch = Monitor(timed(tiny), torch.device("meta"), TrainingState({}, None, ""), CoreShare(tmp_path))
    fake.have(2.0, 50.0)
    assert "".join(watch.warnings(TrainingState({}, None, "", step=9, seconds=60.0))) == ""


def test_without_the_schedulers_account_the_main_thread_tells(tmp_path: Path) -> None:
    share, now = CoreShare(tmp_path / "absent"), time.perf_counter()
    while time.perf_counter() - now < 0.05:
        pass  # busy: whatever share of a core there is
    busy = share.value()
    idle = CoreShare(tmp_path / "absent")
    time.sleep(0.05)
    assert 0 <= idle.value() < busy <= 1


def test_more_than_the_peak_is_the_peak(tiny: Compose) -> None:
    window = Window(mfu=1e-4, sums={"loss": torch.tensor(6.0)}, scored=2, tokens=40_000, scored_tokens=2)
    watch = Monitor(timed(tiny), CPU, state := TrainingState({}, None, "", step=0, window=window))
    figures = window.metrics(2.0, 1e-3, torch.tensor(1.0))  # 20,000 tokens/s: twice what had been measured
    assert figures["train/mfu"] == pytest.approx(1.0)
    assert "faster than it was measured" in "".join(watch.warnings(state))
    window.add_step({"loss": torch.tensor(6.0)}, torch.zeros(()), 2, 30_000, 2)
    assert window.metrics(4.0, 1e-3, torch.tensor(1.0))["train/mfu"] == pytest.approx(0.75)
    assert "".join(watch.warnings(state)) == ""


def test_compiling_is_announced_with_what_it_took(tiny: Compose, tmp_path: Path) -> None:
    config = timed(tiny, "precision.compile=true")
    times = CompileTimes.of(config, tiny_model(), 4)
    assert "(once; precision.compile=false skips it)" in times.announced(180.0)
    times.remember(106.2)
    again = CompileTimes.of(config, tiny_model(), 4)
    assert "(106 s last time, of a budget of 180 s; precision.compile=false" in again.announced(180.0)
    assert "(106 s last time; precision" in again.announced(10_800.0)
    assert "(once;" in CompileTimes.of(config, tiny_model(), 8).announced(180.0)
    again.path.write_text("{")
    assert "(once;" in again.announced(180.0)


def test_compiling_is_announced_once_for_each_shape(tiny: Compose) -> None:
    config, model, said = timed(tiny, "precision.compile=true"), tiny_model(), []
    weight = next(model.parameters())

    def loss(batch: Batch) -> dict[str, Tensor]:
        return {"loss": weight.sum()}

    def batch(rows: int) -> Batch:
        tokens = torch.zeros(rows, 4, dtype=torch.int64)
        return Batch(tokens, tokens, None)

    compilation = Compilation(config, model, torch.optim.SGD(model.parameters()), loss, said.append)
    # A trial of the micro-batch has compiled the step: nothing is left to compile before training.
    compilation.passes(batch(4))
    compilation.passes(batch(4))
    compilation.ahead(batch(4))
    assert [line.partition(" (")[0] for line in said] == ["compiling the training step", "compiled in 0 s"]
    assert weight.grad is not None
    # Memory runs out, and the step goes on with smaller micro-batches.
    compilation.loss_of(batch(2))
    compilation.loss_of(batch(2))
    assert [line.partition(" (")[0] for line in said[2:]] == ["compiling the training step"]


def test_what_is_compiled_is_kept_in_the_cache(tiny: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("PRETUNE_CACHE", str(tmp_path / "cache"))
    settings = ("precision.compile=true", "budget.steps=1", "samples.prompts=[]", "model.num_layers=1")
    assert run(tiny("name=one", *settings)) == 0
    kept = tmp_path / "cache" / "compiled"
    assert (kept / "seconds.json").is_file()
    assert list(kept.rglob("*.so"))
