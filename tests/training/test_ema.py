"""The EMA of weights, against torch's own."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pretune.training.ema import EMA

TAKEN, SKIPPED = torch.zeros(()), torch.ones(())


def trained_steps(model: nn.Module, steps: int):
    """Make updates with random gradients; yield after each."""
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    generator = torch.Generator().manual_seed(3)
    for step in range(1, steps + 1):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        optimizer.step()
        yield step


@pytest.mark.parametrize("tied", [True, False])
def test_the_average_is_torchs(tied: bool) -> None:
    model = tiny_model(tied_embeddings=tied).double()
    average = EMA(model, 0.9, warmup=False)
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    reference.update_parameters(model)  # the first one copies
    for step in trained_steps(model, 20):
        average.update(step, TAKEN)
        reference.update_parameters(model)
    expected = dict(reference.module.named_parameters())
    for name, parameter in average.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-14, atol=1e-14, check_dtype=True)
        assert not torch.equal(parameter, dict(model.named_parameters())[name])


def test_the_decay_grows_so_that_short_runs_forget_their_start() -> None:
    model = tiny_model().double()
    average = EMA(model, 0.95, warmup=True)
    expected = model.embedding.weight.detach().clone()
    for step in trained_steps(model, 200):
        average.update(step, TAKEN)
        decay = min(0.95, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.embedding.weight.detach()
    torch.testing.assert_close(average.model.embedding.weight.detach(), expected, rtol=1e-12, atol=1e-12)


def test_the_two_models_share_what_is_frozen_and_nothing_else() -> None:
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("attention" in name)
    average = EMA(model, 0.9, warmup=True)
    theirs = dict(average.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert (theirs[name] is parameter) == ("attention" not in name)
        assert not theirs[name].requires_grad
    for mine, its in zip(model.buffers(), average.model.buffers(), strict=True):
        assert mine is its
    # Tied weights stay tied, and both models compute the same until something is trained.
    tied = EMA(tiny_model(), 0.9, warmup=True).model
    assert tied.head_weight is tied.embedding.weight
    tokens = torch.arange(12)[None]
    assert torch.equal(model(tokens), average.model(tokens))


def test_averages_of_half_precision_are_float32() -> None:
    model = nn.Linear(4, 4).to(torch.bfloat16)
    average = EMA(model, 0.999, warmup=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    average.model.weight.zero_()
    for step in range(1, 11):
        average.update(step, TAKEN)
    # In bfloat16, steps of a thousandth would soon be rounded away.
    assert average.model.weight.dtype == torch.float32
    torch.testing.assert_close(average.model.weight[0, 0].item(), 1 - 0.999**10, rtol=1e-5, atol=0)


def test_a_skipped_step_is_none_of_the_average() -> None:
    model = nn.Linear(4, 4)
    average = EMA(model, 0.9, warmup=False)
    before = average.model.weight.clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    average.update(1, SKIPPED)
    assert torch.equal(average.model.weight, before)
