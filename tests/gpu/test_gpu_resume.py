"""With deterministic=true, a run on a GPU that is stopped and resumed is bit for bit the uninterrupted one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from card import CARD, ON_THE_CARD
from resumed import resumed_state

pytestmark = [*ON_THE_CARD, pytest.mark.usefixtures("determinism_restored")]
Compose = Callable[..., dict[str, Any]]


# Dropout needs the mask written out; without it, documents are kept apart by flex attention.
@pytest.mark.parametrize(("optimizer", "dropout"), [("adamw", 0.1), ("muon", 0.1), ("muon", 0.0)])
def test_resumed_is_bit_for_bit_the_uninterrupted_run(
    optimizer: str, dropout: float, tiny: Compose, power_cut: Callable[..., None], tmp_path: Path
) -> None:
    settings = [f"device={CARD.type}", "deterministic=true", "precision.compile=true", "data.packing.isolate=true"]
    settings += [f"optimizer={optimizer}", f"model.dropout={dropout}", "budget.steps=20", "optimizer.lr=1e-3"]
    assert resumed_state(tiny, power_cut, tmp_path / "runs", *settings)
