"""Several processes train what one does: the same losses and the same weights, whatever their number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from preference_data import preference_data, write_preferences
from recorded import losses
from same_training import assert_same
from together import together

from pretune.core.config import ConfigError
from pretune.dispatch import run
from pretune.tasks.train.ranks import said_of_speeds

Compose = Callable[..., dict[str, Any]]
SETTINGS: dict[str, tuple[str, ...]] = {
    "adamw": (),
    "lion": ("optimizer=lion", "optimizer.lr=3e-4"),
    "muon": ("optimizer=muon",),
    "documents": ("data.packing.mode=documents", "data.packing.isolate=true", "optimizer.clip_norm=0.1"),
    "ema": ("ema.decay=0.9", "schedule=trapezoid", "batch.warmup={start: 256, over: 1024}"),
}
SMALL = ("batch.micro_batch=2", "batch.tokens=512", "evaluation.micro_batch=3", "log_every=1")
DPO = (
    "stage=dpo", "stage.init_from=adamw", "stage.objective.reference=cached", "model.max_sequence_length=256",
    "batch.tokens=2048", "adapter=lora", "adapter.rank=2", "optimizer.lr=1e-3",
)  # fmt: skip
"""`documents`: rows with padding, so that processes score different numbers of tokens; and a clipped norm."""


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_losses_and_weights_are_those_of_one_process(
    tiny: Compose, composed: Compose, tmp_path: Path, processes: int
) -> None:
    preferences = write_preferences(tmp_path / "preferences.jsonl")

    def mappings(end: str) -> list[dict[str, Any]]:
        found = [tiny(f"name={name}{end}", *SMALL, *more) for name, more in SETTINGS.items()]
        dpo = tiny(f"name=dpo{end}", *SMALL, *DPO)
        dpo["data"] |= preference_data(preferences, composed, "drop")
        return [*found, dpo]

    for mapping in mappings(""):
        assert run(mapping) == 0
    done = together(mappings("-together"), processes, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"in {processes} processes (ddp)") == len(SETTINGS) + 1, "one of them prints"
    assert "each process multiplies matrices at" in done.stdout
    assert f"peak memory of the {processes} processes" in done.stdout
    summary = json.loads((tmp_path / "runs" / "adamw-together" / "summary.json").read_text())
    assert summary["processes"] == processes
    assert 0 < summary["smallest_peak_memory_bytes"] <= summary["peak_memory_bytes"]
    for name in (*SETTINGS, "dpo"):
        assert_same(tmp_path / "runs" / name, tmp_path / "runs" / f"{name}-together")


def test_a_run_goes_on_in_another_number_of_processes(tiny: Compose, tmp_path: Path) -> None:
    """Two processes until a signal reaches one of them, then one process to the end."""
    settings = ("batch.micro_batch=2", "log_every=1")
    assert run(tiny("name=whole", *settings)) == 0
    done = together([tiny("name=moved", *settings)], 2, tmp_path, signals="1 7 SIGTERM")
    assert "exitcode  : 75" in done.stderr, done.stderr[-3000:]
    assert "stopped at step 8; everything is saved" in done.stdout
    assert run(tiny("name=moved", *settings)) == 0
    assert_same(tmp_path / "runs" / "whole", tmp_path / "runs" / "moved")


@pytest.mark.slow
def test_a_killed_process_ends_all_and_a_restart_goes_on(tiny: Compose, tmp_path: Path) -> None:
    settings = ("batch.micro_batch=2", "log_every=1")
    assert run(tiny("name=whole", *settings)) == 0
    done = together([tiny("name=killed", *settings)], 2, tmp_path, signals="1 13 SIGKILL", restarts=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed at step 10" in done.stdout
    assert_same(tmp_path / "runs" / "whole", tmp_path / "runs" / "killed")


@pytest.mark.slow
def test_a_process_that_hangs_is_named(tiny: Compose, tmp_path: Path) -> None:
    done = together([tiny("name=hangs", "parallel.timeout=8")], 2, tmp_path, signals="1 7 SIGSTOP")
    assert done.returncode != 0
    assert "error: rank 1 has not answered within parallel.timeout, in step 8" in done.stderr, done.stderr[-3000:]
    assert (tmp_path / "runs" / "hangs" / "metrics.jsonl").is_file()


@pytest.mark.slow
def test_dropout_differs_between_processes_and_goes_on_as_it_would(tiny: Compose, tmp_path: Path) -> None:
    settings = ("batch.micro_batch=2", "model.dropout=0.2", "log_every=1")
    whole, cut = (tiny(f"name={name}", *settings) for name in ("whole", "cut"))
    done = together([whole, cut], 2, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "runs" / "whole") == losses(tmp_path / "runs" / "cut")
    alone = tiny("name=alone", *settings)
    assert run(alone) == 0
    assert losses(tmp_path / "runs" / "alone")[2] != losses(tmp_path / "runs" / "whole")[2]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param(
            ("parallel=single",),
            "parallel=single, but 2 processes were started: set parallel=ddp, or start one",
            marks=pytest.mark.slow,
        ),
        (
            ("batch.micro_batch=8", "batch.tokens=256"),
            "is not a multiple of what 2 processes read at once (512 tokens)",
        ),
        pytest.param(("stage.init_from=nowhere", "stage=finetune"), "no run 'nowhere'", marks=pytest.mark.slow),
    ],
)
def test_what_is_wrong_is_said_once(tiny: Compose, tmp_path: Path, settings: tuple[str, ...], expected: str) -> None:
    done = together([tiny("name=wrong", *settings)], 2, tmp_path)
    assert done.stderr.count(expected) == 1, done.stderr[-3000:]
    assert "exitcode  : 2" in done.stderr
    assert "Traceback" not in done.stderr.partition("ChildFailedError")[0].partition("Traceback (most")[0]


def test_processes_of_different_configurations_are_refused(tiny: Compose, tmp_path: Path) -> None:
    both = [tiny("name=one"), tiny("name=one", "optimizer.lr=1")]
    done = together([both], 2, tmp_path)
    assert done.stderr.count("the configuration of rank 1 differs from that of rank 0") == 1, done.stderr[-3000:]
    assert not (tmp_path / "runs").exists()


def test_other_tasks_are_one_process(tiny: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="task=evaluate is one process, but 2 were started: start it without"):
        run(tiny("name=one", "task=evaluate"))


def test_one_process_alone_is_no_data_parallelism(tiny: Compose) -> None:
    with pytest.raises(ConfigError, match="parallel=ddp needs several processes: torchrun"):
        run(tiny("name=one", "parallel=ddp"))


def test_a_slow_process_is_named() -> None:
    assert [*said_of_speeds([])] == []
    assert [*said_of_speeds([2e12, 1.9e12])] == ["each process multiplies matrices at 1,900 to 2,000 GFLOP/s"]
    lines = [*said_of_speeds([2e9, 1e9, 2e9])]
    assert lines[0] == "each process multiplies matrices at 1 to 2 GFLOP/s"
    assert lines[1].startswith("warning: rank 1 has 50% of the fastest one's speed")
    assert len(lines) == 2
