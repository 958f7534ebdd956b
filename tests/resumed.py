"""A run that is stopped and resumed, against the same run that is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from recorded import losses, weights
from torch import Tensor

from pretune.dispatch import run


def resumed_state(
    tiny: Callable[..., dict[str, Any]], power_cut: Callable[..., None], runs: Path, *settings: str
) -> dict[str, Tensor]:
    """Train the twenty steps of `tiny(*settings)`, in the folder `runs`, at once and with a power cut; check that both
    are the same bit for bit. Returns weights and optimizer state."""
    assert run(tiny("name=whole", *settings)) == 0

    # After the checkpoint of step 10.
    power_cut(tiny("name=cut", *settings), 14)
    assert run(tiny("name=cut", *settings)) == 0

    assert losses(runs / "cut") == losses(runs / "whole")
    whole, cut = weights(runs / "whole", 20), weights(runs / "cut", 20)
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert (runs / "cut" / "progress.txt").read_text() == (runs / "whole" / "progress.txt").read_text()
    return whole
