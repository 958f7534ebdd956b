"""Whether two runs were trained alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recorded import losses, series, weights


def assert_same(one: Path, several: Path, steps: int = 20) -> None:
    """The run in folder `several` was trained as that in `one`: losses, norms, weights and optimizer state."""
    found = [values for values in losses(several) if values[0] <= steps]
    assert len(found) == len([values for values in losses(one) if values[0] <= steps])
    for (step, *mine), (other, *theirs) in zip(losses(one), found, strict=False):
        assert step == other
        assert theirs == pytest.approx(mine, abs=2e-6, nan_ok=True) or None in mine
    for name in ("train/loss", "val/loss", "train/grad_norm", "train/tokens_per_second"):
        assert len(series(one, name)) == len(series(several, name))
    torch.testing.assert_close(series(several, "train/grad_norm"), series(one, "train/grad_norm"), rtol=1e-3, atol=1e-5)
    mine, theirs = weights(one, steps), weights(several, steps)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        if not name.startswith("random:"):
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-5)
