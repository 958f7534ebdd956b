"""Optimizers on a GPU against the same on the CPU; AdamW, fused, against torch's own in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from card import CARD, ON_THE_CARD, assert_near
from optimizer_sections import EVERY_OPTIMIZER, NAMES, adamw
from tiny import tiny_model
from torch import Tensor, nn

from pretune.optim.config import LinearConfig, OptimizerConfig
from pretune.optim.optimizers import build_optimizer, clip_gradients, set_progress, update

pytestmark = ON_THE_CARD
CPU = torch.device("cpu")
SCHEDULE = LinearConfig.model_validate({"kind": "linear", "warmup": 0.0, "initial": 0.0, "final": 0.0})
CLIP = 5.0
PROGRESS = (0.0, 0.3, 0.6)
every_optimizer = pytest.mark.parametrize("config", EVERY_OPTIMIZER, ids=NAMES)


def model_on(device: torch.device) -> nn.Module:
    """With parameters that adamw_8bit keeps in 8 bits: those of 4,096 weights and more."""
    return tiny_model(dim=64, head_dim=16, mlp_dim=96).to(device)


def set_gradients(model: nn.Module, step: int) -> None:
    """Gradients that do not depend on the weights."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)


def trained(config: OptimizerConfig, device: torch.device) -> nn.Module:
    """A model after three steps, as the training loop makes them."""
    model = model_on(device)
    optimizer = build_optimizer(config, model)
    for step, progress in enumerate(PROGRESS):
        set_gradients(model, step)
        set_progress(optimizer, config, SCHEDULE, progress)
        assert not update(optimizer, clip_gradients(model, CLIP))
    return model


def moves(model: nn.Module) -> dict[str, Tensor]:
    """How far each parameter is from where it began."""
    start = dict(model_on(CPU).named_parameters())
    return {name: parameter.detach().cpu() - start[name].detach() for name, parameter in model.named_parameters()}


def test_fused_adamw_is_torchs_in_float64() -> None:
    config, model = adamw(), model_on(CPU).double()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, foreach=False)
    for step, progress in enumerate(PROGRESS):
        set_gradients(model, step)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * (1 - progress)
        optimizer.step()
    wanted = moves(model)
    for name, moved in moves(trained(config, CARD)).items():
        assert_near(moved, wanted[name], name)


@every_optimizer
def test_three_steps_equal_those_on_the_cpu(config: OptimizerConfig) -> None:
    wanted = moves(trained(config, CPU))
    for name, moved in moves(trained(config, CARD)).items():
        if config.kind == "adamw_8bit":  # what lies between two of its 256 values may be rounded either way
            assert (moved - wanted[name]).norm() < 0.01 * wanted[name].norm(), name
        else:
            assert_near(moved, wanted[name], name, share=1e-3)  # Muon's iteration magnifies rounding


@every_optimizer
@pytest.mark.parametrize("before", [0, 2])
def test_a_step_that_is_not_finite_changes_nothing(config: OptimizerConfig, before: int) -> None:
    model = model_on(CARD)
    optimizer = build_optimizer(config, model)

    def step(spoil: Callable[[Tensor], object], seed: int) -> Tensor:
        set_gradients(model, seed)
        for parameter in model.parameters():
            assert parameter.grad is not None
            spoil(parameter.grad)
        return update(optimizer, clip_gradients(model, CLIP))

    for seed in range(before):
        assert not step(lambda gradient: None, seed)
    then = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert step(lambda gradient: gradient.view(-1)[0].fill_(torch.nan), before)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, then[name]), name
