"""Memory that runs out anywhere but in the passes of a step, where smaller micro-batches would help."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pretune.core.config import InputError
from pretune.dispatch import run
from pretune.run import assembly, out_of_memory
from pretune.tasks.train import loop

Compose = Callable[..., dict[str, Any]]


def full(*given: Any, **more: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 256.00 MiB.")


def test_a_model_that_does_not_fit_is_one_line(tiny: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "training_model", full)
    monkeypatch.setattr(out_of_memory, "total_memory", lambda device: 2**16)
    with pytest.raises(
        InputError, match=r"cpu, which has 0.1 MiB; .* weights alone take 0.\d MiB; a smaller model may"
    ):
        run(tiny())


def test_an_evaluation_that_does_not_fit_says_what_to_set(tiny: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "evaluate", full)
    with pytest.raises(InputError, match=r"out of memory on cpu.*; a smaller evaluation.micro_batch, .* may fit"):
        run(tiny())


def test_any_other_error_is_left_alone(tiny: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any, **more: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(loop, "evaluate", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(tiny())
