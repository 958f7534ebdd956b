"""The chunked cross-entropy against torch's own, in float64 and in lower precisions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretune.core.batch import IGNORE
from pretune.objectives.cross_entropy import linear_cross_entropy, linear_token_losses


def inputs(positions: int, vocab: int, dim: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(positions, dim, dtype=torch.float64, generator=generator).to(dtype)
    weight = torch.randn(vocab, dim, dtype=torch.float64, generator=generator).to(dtype)
    return [hidden.requires_grad_(), weight.requires_grad_()]


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, softcap: float | None) -> Tensor:
    logits = hidden @ weight[:vocab_size].T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE)


@settings(max_examples=60)
@given(data=st.data())
def test_equals_torch_in_float64_for_any_shape_and_mask(data: st.DataObject) -> None:
    vocab = data.draw(st.integers(1, 12), label="vocab")
    padding = data.draw(st.integers(0, 3), label="padding rows")
    softcap = data.draw(st.sampled_from([None, 0.5, 15.0]), label="softcap")
    scored = data.draw(st.lists(st.one_of(st.just(IGNORE), st.integers(0, vocab - 1)), max_size=17), label="targets")
    chunk = data.draw(st.integers(1, 20), label="chunk")
    scale = data.draw(st.sampled_from([1.0, -0.25, 1e-3]), label="scale")
    targets = torch.tensor(scored, dtype=torch.int64)
    hidden, weight = inputs(len(scored), vocab + padding, data.draw(st.integers(1, 5), label="dim"))

    ours = linear_cross_entropy(hidden, weight, targets, vocab, softcap, chunk)
    theirs = reference(hidden, weight, targets, vocab, softcap)
    torch.testing.assert_close(ours, theirs)
    for got, wanted in zip(
        torch.autograd.grad(ours * scale, (hidden, weight)),
        torch.autograd.grad(theirs * scale, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


@settings(max_examples=60)
@given(data=st.data())
def test_each_positions_loss_equals_torch_however_it_is_weighed(data: st.DataObject) -> None:
    vocab = data.draw(st.integers(1, 12), label="vocab")
    softcap = data.draw(st.sampled_from([None, 0.5, 15.0]), label="softcap")
    targets = torch.tensor(
        data.draw(st.lists(st.one_of(st.just(IGNORE), st.integers(0, vocab - 1)), max_size=17), label="targets"),
        dtype=torch.int64,
    )
    chunk = data.draw(st.integers(1, 20), label="chunk")
    hidden, weight = inputs(len(targets), vocab + data.draw(st.integers(0, 3), label="padding rows"), 4)
    weigh = torch.randn(len(targets), dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    ours = linear_token_losses(hidden, weight, targets, vocab, softcap, chunk)
    logits = hidden @ weight[:vocab].T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    theirs = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE)
    torch.testing.assert_close(ours, theirs)
    for got, wanted in zip(
        torch.autograd.grad((ours * weigh).sum(), (hidden, weight)),
        torch.autograd.grad((theirs * weigh).sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


def test_each_positions_loss_with_a_frozen_head_and_in_bfloat16() -> None:
    hidden, weight = inputs(9, 8, 4, torch.float32)
    targets = torch.tensor([1, IGNORE, 0, 4, 2, 7, 7, 3, IGNORE])
    with torch.autocast("cpu", torch.bfloat16):
        losses = linear_token_losses(hidden, weight.detach(), targets, 8, None, 4)
        whole = linear_cross_entropy(hidden, weight.detach(), targets, 8, None, 4)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.sum(), whole)
    (ours,), (theirs,) = torch.autograd.grad(losses.sum(), hidden), torch.autograd.grad(whole, hidden)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradients_are_those_of_finite_differences(softcap) -> None:
    targets = torch.tensor([1, IGNORE, 0, 4, 2])
    hidden, weight = inputs(5, 6, 3)
    torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, 5, softcap, 2), (hidden, weight))


def test_nothing_to_score_changes_nothing() -> None:
    hidden, weight = inputs(6, 8, 4, torch.float32)
    loss = linear_cross_entropy(hidden, weight, torch.full((6,), IGNORE), 8, None, 4)
    assert loss.item() == 0
    loss.backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_a_position_that_is_not_scored_may_hold_anything() -> None:
    hidden, weight = inputs(3, 8, 4, torch.float32)
    with torch.no_grad():
        hidden[1] = torch.inf
    loss = linear_cross_entropy(hidden, weight, torch.tensor([2, IGNORE, 3]), 8, None, 3)
    gradient = torch.autograd.grad(loss, hidden)[0]
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_extreme_logits_stay_finite(scale) -> None:
    hidden, weight = inputs(8, 20, 16, torch.float32)
    hidden = (scale * hidden.detach()).requires_grad_()
    targets = torch.arange(8)
    ours = linear_cross_entropy(hidden, weight, targets, 20, None, 3)
    torch.testing.assert_close(ours, reference(hidden, weight, targets, 20, None))
    assert all(g.isfinite().all() for g in torch.autograd.grad(ours, (hidden, weight)))


@pytest.mark.parametrize(("hidden_learns", "weight_learns"), [(True, False), (False, True), (False, False)])
def test_gradients_only_for_what_learns(hidden_learns, weight_learns) -> None:
    hidden, weight = inputs(6, 8, 4)
    targets = torch.arange(6)
    wanted = torch.autograd.grad(reference(hidden, weight, targets, 8, None), (hidden, weight))
    hidden, weight = hidden.detach().requires_grad_(hidden_learns), weight.detach().requires_grad_(weight_learns)
    loss = linear_cross_entropy(hidden, weight, targets, 8, None, 4)
    assert loss.requires_grad == (hidden_learns or weight_learns)
    if loss.requires_grad:
        loss.backward()
    for tensor, gradient in ((hidden, wanted[0]), (weight, wanted[1])):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, gradient)
        else:
            assert tensor.grad is None


def test_one_matrix_at_both_ends_gets_both_gradients() -> None:
    weight = inputs(1, 9, 4)[1]
    read, targets = torch.tensor([3, 1, 4, 1, 5]), torch.tensor([1, 4, 1, 5, 8])
    ours = torch.autograd.grad(linear_cross_entropy(weight[read].tanh(), weight, targets, 9, None, 2), weight)[0]
    theirs = torch.autograd.grad(reference(weight[read].tanh(), weight, targets, 9, None), weight)[0]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_autocast_multiplies_in_bf16_and_sums_in_float32(hidden_dtype) -> None:
    hidden, weight = inputs(512, 300, 64, torch.float32)
    hidden = (hidden.detach() / 8).to(hidden_dtype).requires_grad_()
    targets = torch.randint(0, 300, (512,), generator=torch.Generator().manual_seed(1))
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = reference(*wide, targets, 300, None)
    exact_gradients = torch.autograd.grad(exact, wide)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, 300, None, 100)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)  # a bf16 sum would be off by 1e-2
    for got, like, wanted in zip(
        torch.autograd.grad(loss, (hidden, weight)), (hidden, weight), exact_gradients, strict=True
    ):
        assert got.dtype == like.dtype
        assert (got - wanted).norm() / wanted.norm() < 0.01
