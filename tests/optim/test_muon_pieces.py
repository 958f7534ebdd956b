"""A matrix that fuses several is several to Muon: queries, keys and values; gate and up."""

from __future__ import annotations

import pytest
import torch
from optimizer_sections import muon
from tiny import tiny_model
from torch import nn

from pretune.model.config import GATED
from pretune.optim.groups import trained_parameters
from pretune.optim.optimizers import build_optimizer


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "reglu", "relu_squared"])
def test_fused_matrices_move_as_torchs_muon_moves_each_alone(activation: str) -> None:
    model, section = tiny_model(activation=activation, num_kv_heads=2), muon()
    trained = [one for one in trained_parameters(model) if one.role == "hidden"]
    generator = torch.Generator().manual_seed(3)
    apart: list[nn.Parameter] = []
    for one in trained:
        one.parameter.grad = torch.randn(one.parameter.shape, generator=generator)
        sizes = [len(one.parameter)]
        if one.name.endswith("qkv.weight"):
            sizes = [32, 16, 16]
        elif one.name.endswith("gate_up.weight"):
            sizes = [48, 48]
        pieces = zip(one.parameter.detach().split(sizes), one.parameter.grad.split(sizes), strict=True)
        for piece, gradient in pieces:
            alone = nn.Parameter(piece.clone())
            alone.grad = gradient.clone()
            apart.append(alone)
    assert len(apart) == len(trained) + 2 * (2 + (activation in GATED))
    reference = torch.optim.Muon(
        apart,
        lr=section.lr,
        weight_decay=section.weight_decay,
        momentum=section.momentum,
        nesterov=section.nesterov,
        ns_steps=section.ns_steps,
        adjust_lr_fn=section.scale,
    )
    optimizer = build_optimizer(section, model, dtype=torch.bfloat16)
    for _ in range(3):
        reference.step()
        optimizer.step()
    found = torch.cat([one.parameter.detach().flatten() for one in trained])
    # Matrices of one shape are orthogonalized together, which rounds differently.
    torch.testing.assert_close(found, torch.cat([one.detach().flatten() for one in apart]), rtol=0, atol=3e-4)
