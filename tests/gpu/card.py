"""The GPU that these tests compute on, and how its results are compared with those of the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

CARD = torch.device("cuda")
# Which warnings torch's compiler and libraries have depends on the card and its driver, and none of them is ours.
ON_THE_CARD = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
SHARE = 1e-4
"""Rounding in float32 is a hundredth of this share of a tensor's largest value; that of TensorFloat-32 is larger."""


def assert_near(found: Tensor, wanted: Tensor, name: str, share: float = SHARE) -> None:
    """Check that a result is the wanted one, up to a share of the largest of its values, wherever both are."""
    assert found.shape == wanted.shape, name
    found, wanted = (tensor.detach().cpu().double() for tensor in (found, wanted))
    tolerance = share * wanted.abs().max().item()
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance, msg=lambda message: f"{name}: {message}")
