"""A trained run with other positions than it was trained with: evaluated as it is, and as the start of another run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import SCALINGS

from pretune.dispatch import run


@pytest.mark.parametrize("kind", ["ntk", "yarn", "dynamic", "theta"])
def test_positions_may_be_stretched_after_training(
    kind: str, tiny: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ("name=base", "model.max_sequence_length=32", "budget.steps=2")
    longer = ("name=base", "model.max_sequence_length=64", "data.sequence_length=64")
    assert run(tiny(*plain)) == 0
    changes: dict[str, Any] = {"theta": 1e5} if kind == "theta" else {"scaling": SCALINGS[kind]}
    results = []
    for change in ({}, changes):
        mapping = tiny(*longer, "task=evaluate")
        mapping["model"]["rope"] |= change
        capsys.readouterr()
        assert run(mapping) == 0
        assert ("stretch them by model.rope.scaling" in capsys.readouterr().err) is (not change)
        results.append(json.loads((tmp_path / "runs" / "base" / "evaluation.json").read_text())["val/loss"])
    assert results[0] != results[1]
    assert len(list((tmp_path / "runs" / "base" / "evaluations").glob("step-*.json"))) == 2  # both are kept
    mapping = tiny(*longer, "name=tuned", "stage=finetune", "stage.init_from=base", "budget.steps=1")
    mapping["model"]["rope"] |= changes
    assert run(mapping) == 0
