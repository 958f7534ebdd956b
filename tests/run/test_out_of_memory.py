"""Memory that runs out anywhere but in the passes of a step, where smaller micro-batches would help."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pretune.core.config import InputError, validate
from pretune.dispatch import run
from pretune.run.config import RunConfig
from pretune.run.out_of_memory import out_of_memory
from pretune.tasks.train.running import Instruments, Run

Compose = Callable[..., dict[str, Any]]


def test_a_model_that_does_not_fit_is_named_with_its_size(tiny: Compose) -> None:
    said = str(out_of_memory(validate(RunConfig, tiny()), lambda device: 2**16))
    assert re.search(r"cpu, which has 0.1 MiB; .* weights alone take 0.\d MiB; a smaller model may", said)


def in_evaluations(error: Exception) -> Instruments:
    """Instruments with which every evaluation raises `error`."""

    def begin(training: Run, what: object) -> None:
        if what == "evaluation":
            raise error

    return Instruments(on_begin=begin)


def test_an_evaluation_that_does_not_fit_says_what_to_set(tiny: Compose) -> None:
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 256.00 MiB.")
    with pytest.raises(InputError, match=r"out of memory on cpu.*; a smaller evaluation.micro_batch, .* may fit"):
        run(tiny(), in_evaluations(full))


def test_any_other_error_is_left_alone(tiny: Compose) -> None:
    broken = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(tiny(), in_evaluations(broken))
