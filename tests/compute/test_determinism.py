"""The key `deterministic`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded import series

from pretune.dispatch import run
from pretune.tasks.train.running import Instruments

Compose = Callable[..., dict[str, Any]]


@pytest.mark.usefixtures("determinism_restored")
@pytest.mark.parametrize("wanted", [False, True])
def test_the_key_reaches_torch(wanted: bool, tiny: Compose) -> None:
    seen = []
    watch = Instruments(on_begin=lambda training, what: seen.append(torch.are_deterministic_algorithms_enabled()))
    assert run(tiny(f"deterministic={str(wanted).lower()}", "budget.steps=1"), watch) == 0
    assert set(seen) == {wanted}


@pytest.mark.usefixtures("determinism_restored")
def test_a_cpu_computes_the_same_either_way(tiny: Compose, tmp_path: Path) -> None:
    for name, value in (("plain", "false"), ("deterministic", "true")):
        assert run(tiny(f"name={name}", f"deterministic={value}", "budget.steps=4", "log_every=1")) == 0
    plain, deterministic = (series(tmp_path / "runs" / name, "train/loss") for name in ("plain", "deterministic"))
    assert plain == deterministic
