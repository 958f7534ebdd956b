"""The loss scale against torch's own GradScaler."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretune.compute.loss_scale import INITIAL, INTERVAL, LEAST, MOST, LossScale


@given(st.lists(st.sampled_from(["overflow", "good", "almost grown"]), max_size=40))
def test_it_moves_as_grad_scalers_does(steps: list[str]) -> None:
    ours, overflows = LossScale.of("float16"), 0
    theirs = torch.amp.GradScaler("cpu", init_scale=INITIAL, growth_interval=INTERVAL)  # pyright: ignore[reportPrivateImportUsage]
    for step in steps:
        if not LEAST < ours.value < MOST:
            break  # GradScaler's has no limits
        if step == "almost grown":  # as after so many good steps
            ours.steps = INTERVAL - 1
            theirs.load_state_dict({**theirs.state_dict(), "_growth_tracker": INTERVAL - 1})
        weight = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([weight], 0.0)
        theirs.scale(weight.sum()).backward()
        if step == "overflow":
            assert weight.grad is not None
            weight.grad.fill_(torch.inf)
            assert ours.lower()
            overflows += 1
        else:
            ours.step()
        theirs.step(optimizer)
        theirs.update()
        assert ours.value == theirs.get_scale()
    assert ours.overflows == overflows


def test_it_ends_somewhere() -> None:
    scale = LossScale.of("float16")
    while scale.lower():
        pass
    assert scale.value == LEAST
    for _ in range(60 * INTERVAL):
        scale.step()
    assert scale.value == MOST


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
