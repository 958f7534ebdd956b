"""Fixtures of the tests that need a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _exact_and_compiled_anew() -> Iterator[None]:
    """Products in float32 are exact, whatever a run before set, and nothing is compiled yet."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.compiler.reset()
    yield
    torch.set_float32_matmul_precision(before)
