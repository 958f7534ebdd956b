"""Benchmarks keep up with the code: each imports, what it configures is valid, and its shortest form runs."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pretune.core.config import validate
from pretune.run.config import RunConfig

FOLDER = Path(__file__).parents[1] / "benchmarks"
Compose = Callable[..., dict[str, Any]]
SHORTEST = {
    "cross_entropy": ["--rounds", "1", "--shapes", "nano", "--device", "cpu"],
    "memory": ["--cases", "nano", "--device", "cpu"],
    "startup": ["--runs", "1"],
    "time_budget": ["--runs", "1", "--seconds", "2"],
}


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """`benchmark(name)`: the module of a benchmark."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_each_can_be_imported(name: str, benchmark: Callable[[str], ModuleType]) -> None:
    assert Path(str(benchmark(name).__file__)).parent == FOLDER


def test_cases_of_memory_are_valid(benchmark: Callable[[str], ModuleType]) -> None:
    memory = benchmark("memory")
    configured = [memory.configured(case, "cpu") for case in memory.CASES]
    assert all(config.precision.compute != "auto" for config in configured)


def test_switches_of_ablations_are_valid_and_change_something(
    composed: Compose, benchmark: Callable[[str], ModuleType]
) -> None:
    ablations = benchmark("ablations")
    recipe = composed(ablations.OURS)
    for name, switches in ablations.SWITCHES.items():
        mapping = composed(ablations.OURS, *switches)
        validate(RunConfig, mapping)
        assert (mapping == recipe) == (name == "the recipe"), name


def test_runs_of_precision_are_valid(composed: Compose, benchmark: Callable[[str], ModuleType]) -> None:
    for precision in ("fp32", "bf16", "fp16", "auto"):
        settings = ["budget.time=null", "budget.steps=300", *benchmark("precision").SMALL, f"precision={precision}"]
        assert validate(RunConfig, composed("quickstart_pretrain", *settings)).budget.steps == 300


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORTEST)
def test_the_shortest_form_ends_with_its_claim(name: str) -> None:
    command = [sys.executable, str(FOLDER / f"{name}.py"), *SHORTEST[name]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["claim"]
