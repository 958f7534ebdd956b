"""The loss scale against torch's own GradScaler."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretune.compute import loss_scale
from pretune.compute.loss_scale import LossScale


@given(st.lists(st.booleans(), max_size=60))
def test_it_moves_as_grad_scalers_does(overflows: list[bool]) -> None:
    ours = LossScale.of("float16")
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)  # pyright: ignore[reportPrivateImportUsage]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_scale, "INTERVAL", 3)
        patch.setattr(loss_scale, "LEAST", 2.0**-100)
        patch.setattr(loss_scale, "MOST", 2.0**100)
        for overflow in overflows:
            weight = torch.nn.Parameter(torch.ones(1))
            optimizer = torch.optim.SGD([weight], 0.0)
            theirs.scale(weight.sum()).backward()
            if overflow:
                assert weight.grad is not None
                weight.grad.fill_(torch.inf)
                assert ours.lower()
            else:
                ours.step()
            theirs.step(optimizer)
            theirs.update()
            assert ours.value == theirs.get_scale()
    assert ours.overflows == sum(overflows)


def test_it_ends_somewhere() -> None:
    scale = LossScale.of("float16")
    while scale.lower():
        pass
    assert scale.value == loss_scale.LEAST
    for _ in range(60 * loss_scale.INTERVAL):
        scale.step()
    assert scale.value == loss_scale.MOST


@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
def test_other_types_need_none(activations: str) -> None:
    scale = LossScale.of(activations)
    assert scale.value == 1
    assert not scale.lower()
    scale.step()
    assert scale == LossScale.of(activations)
    assert scale.metrics() == {}


def test_a_run_that_goes_on_in_another_type_gets_what_that_needs() -> None:
    scaled = LossScale(512.0, steps=7, overflows=9)
    assert scaled.for_activations("float16") is scaled
    assert scaled.for_activations("bfloat16") == LossScale(None)
    assert LossScale(None).for_activations("float16") == LossScale.of("float16")
