"""`-m`: the jobs of a sweep, the value returned to the sweeper, and the exit code."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn

from pretune.core.config import ConfigError
from pretune.launch.compose import QUIET, hydra_for
from pretune.launch.sweep import LONGEST, JobFailed, fixed_keys, job, job_name, sweep
from pretune.training.signals import EXIT_STOPPED

SRC = Path(__file__).parents[2] / "src"
MAIN, SMOKE = SRC / "main.py", SRC / "config" / "run" / "smoke.yaml"


@pytest.fixture
def short(texts: Path, tmp_path: Path) -> list[str]:
    """Overrides that shorten the smoke run to two steps."""
    return [
        "data=files",
        f"data.source.files=[{texts}]",
        "data.validation.fraction=0.2",
        "data.num_workers=1",
        "data.tokenizer.vocab_size=300",
        "model.vocab_size=320",
        "budget.steps=2",
        "samples.prompts=[]",
        "device=cpu",
        f"output_dir={tmp_path}/runs",
    ]


def test_each_combination_is_a_run_of_its_own(
    short: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # One job is refused, the others run; the exit code reports it.
    assert sweep(SMOKE, [*short, "optimizer.lr=1e-3,-1", "seed=1"]) == 2
    assert "'optimizer.lr' = -1" in capfd.readouterr().err
    done = [path.parent.name for path in (tmp_path / "runs").glob("*/summary.json")]
    assert done == ["smoke,optimizer.lr=0.001"]


def test_a_sweeper_is_told_the_validation_loss(short: list[str], tmp_path: Path) -> None:
    overrides = [*QUIET, *short, "seed=1,2"]
    with hydra_for(SMOKE, overrides) as name:
        hydra: Any = GlobalHydra.instance().hydra
        (results,) = hydra.multirun(
            name, partial(job, file=SMOKE, fixed=fixed_keys(short)), overrides, with_log_configuration=False
        )
    losses = [json.loads(path.read_text())["val/loss"] for path in sorted((tmp_path / "runs").glob("*/summary.json"))]
    assert all(isinstance(result, JobReturn) for result in results)
    assert [result.return_value for result in results] == losses
    assert losses[0] != losses[1]


def test_a_signal_ends_the_whole_sweep(short: list[str], tmp_path: Path) -> None:
    settings = [one for one in short if not one.startswith("budget")]
    command = [sys.executable, str(MAIN), "--config", str(SMOKE), *settings, "budget.steps=100000", "seed=1,2", "-m"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list((tmp_path / "runs").glob("*/metrics.jsonl")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, output
    assert [path.name for path in (tmp_path / "runs").glob("smoke*")] == ["smoke,seed=1"]
    assert list((tmp_path / "runs" / "smoke,seed=1" / "checkpoints").iterdir())


def test_a_job_that_cannot_be_composed_is_found_before_any_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no option 'lyon'"):
        sweep(SMOKE, [f"output_dir={tmp_path}/runs", "optimizer=adamw,lyon"])
    assert not list((tmp_path / "runs").glob("*/config.yaml"))


def test_the_result_of_a_failed_job_crosses_processes() -> None:
    assert pickle.loads(pickle.dumps(JobFailed(2))).code == 2


def test_a_job_is_named_after_what_the_sweep_sets() -> None:
    overrides = ["data=files", "data.source.files=[a,b]", "optimizer=adamw,lion", "optimizer.lr=1e-3,2e-3", "seed=7"]
    fixed = fixed_keys(overrides)
    assert fixed == {"data", "data.source.files", "seed"}
    chosen = ["data=files", "data.source.files=[a,b]", "optimizer=lion", "optimizer.lr=2e-3", "seed=7"]
    assert job_name("x", chosen, fixed) == "x,optimizer=lion,optimizer.lr=2e-3"
    long = [job_name("x", [f"data.source.files=[{'a' * 300}{letter}]"], ()) for letter in "bc"]
    assert max(map(len, long)) == LONGEST
    assert long[0] != long[1]
