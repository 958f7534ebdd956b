"""Optimizers: equal to the libraries' own, driven directly."""

from __future__ import annotations

import copy
from collections.abc import Callable

import lion_pytorch
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pretune.optim.config import AdamWConfig, LionConfig, MuonConfig, OptimizerConfig
from pretune.optim.optimizers import build_optimizer, clip_gradients, set_learning_rate

BASE = {"lr": 0.01, "weight_decay": 0.1, "clip_norm": None}
ADAMW = AdamWConfig.model_validate({"kind": "adamw", "betas": (0.9, 0.95), "eps": 1e-8, **BASE})
LION = LionConfig.model_validate({"kind": "lion", "betas": (0.95, 0.98), **BASE})
REST = {"embedding_lr": 0.3, "head_lr": 0.2, "scalar_lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.5}
MUON = MuonConfig.model_validate(
    {"kind": "muon", "momentum": 0.9, "nesterov": True, "ns_steps": 4, "scale": "original", "adamw": REST, **BASE}
)
FACTORS = (0.1, 1.0, 0.5)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(16, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 24), nn.Linear(24, 8)])
        self.norm = nn.RMSNorm(8)
        self.head = nn.Linear(8, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.layers[1](torch.relu(self.layers[0](x)))
        return self.head(self.norm(x))


def loss(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(16, (4, 9), generator=generator)
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(model: nn.Module, steps: int, update: Callable[[int], None]) -> dict[str, Tensor]:
    for step in range(steps):
        model.zero_grad()
        loss(model, step).backward()
        update(step)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def train_ours(config: OptimizerConfig) -> dict[str, Tensor]:
    model = Model()
    optimizer = build_optimizer(config, model)

    def update(step: int) -> None:
        set_learning_rate(optimizer, FACTORS[step])
        optimizer.step()

    return train(model, len(FACTORS), update)


def train_reference(make: Callable[[Model], list[tuple[Optimizer, list[float]]]]) -> dict[str, Tensor]:
    """Train with optimizers that `make` builds, each with the peak learning rates of its groups."""
    model = Model()
    optimizers = make(model)

    def update(step: int) -> None:
        for optimizer, peaks in optimizers:
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * FACTORS[step]
            optimizer.step()

    return train(model, len(FACTORS), update)


def split(model: Model) -> list[dict]:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def test_adamw_is_torchs():
    def make(model: Model) -> list[tuple[Optimizer, list[float]]]:
        return [(torch.optim.AdamW(split(model), betas=(0.9, 0.95), eps=1e-8), [0.01, 0.01])]

    torch.testing.assert_close(train_ours(ADAMW), train_reference(make), rtol=1e-5, atol=1e-7)  # fused against loops


def test_lion_is_lion_pytorchs():
    def make(model: Model) -> list[tuple[Optimizer, list[float]]]:
        return [(lion_pytorch.Lion(split(model), betas=(0.95, 0.98)), [0.01, 0.01])]

    torch.testing.assert_close(train_ours(LION), train_reference(make), rtol=0, atol=0)


def test_muon_is_torchs_with_adamw_for_the_rest():
    def make(model: Model) -> list[tuple[Optimizer, list[float]]]:
        hidden = [layer.get_parameter("weight") for layer in model.layers]
        muon = torch.optim.Muon(hidden, weight_decay=0.1, momentum=0.9, ns_steps=4, adjust_lr_fn="original")
        vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
        rest = [
            {"params": [model.embedding.weight], "weight_decay": 0.5},
            {"params": [model.head.weight], "weight_decay": 0.5},
            {"params": vectors, "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(rest, betas=(0.8, 0.95), eps=1e-8, fused=True)
        return [(muon, [0.01]), (adamw, [0.3, 0.2, 0.1])]

    torch.testing.assert_close(train_ours(MUON), train_reference(make), rtol=0, atol=0)


@pytest.mark.parametrize("config", [ADAMW, LION, MUON], ids=lambda config: config.kind)
def test_the_learning_rate_reaches_every_group_and_the_sections_own_is_returned(config: OptimizerConfig):
    optimizer = build_optimizer(config, Model())
    assert set_learning_rate(optimizer, 0.5) == 0.005
    assert set_learning_rate(optimizer, 0.25) == 0.0025  # of the peak, not of what it was
    for group in optimizer.param_groups:
        assert group["lr"] == 0.25 * group["peak_lr"]
    model = Model()
    optimizer = build_optimizer(config, model)
    before = copy.deepcopy(model.state_dict())
    loss(model, 0).backward()
    set_learning_rate(optimizer, 0.0)
    optimizer.step()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("config", [ADAMW, LION, MUON], ids=lambda config: config.kind)
def test_state_dicts_go_round(config: OptimizerConfig):
    """torch's own way to save an optimizer works for ours too."""
    model = Model()
    optimizer = build_optimizer(config, model)
    train(model, 2, lambda _: optimizer.step())
    twin = copy.deepcopy(model)
    other = build_optimizer(config, twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    torch.testing.assert_close(
        train(model, 2, lambda _: optimizer.step()), train(twin, 2, lambda _: other.step()), rtol=0, atol=0
    )


@pytest.mark.parametrize("max_norm", [0.05, 1e3])
def test_clipping_is_torchs(max_norm: float):
    ours, reference = Model(), Model()
    for model in (ours, reference):
        loss(model, 0).backward()
    norm = clip_gradients(ours, max_norm)
    assert norm == nn.utils.clip_grad_norm_(reference.parameters(), max_norm)
    for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)


def test_without_clipping_the_norm_is_measured_and_gradients_are_left():
    model = Model()
    (100 * loss(model, 0)).backward()
    before = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    norm = clip_gradients(model, None)
    assert norm == pytest.approx(float(torch.cat([gradient.flatten() for gradient in before]).norm()))
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0)


def test_a_model_without_gradients_has_norm_zero():
    assert clip_gradients(Model(), 1.0) == 0


@pytest.mark.parametrize("config", [ADAMW, LION, MUON], ids=lambda config: config.kind)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("max_norm", [1.0, None])
def test_what_is_not_finite_never_reaches_weights_or_state(
    config: OptimizerConfig, value: float, max_norm: float | None
):
    """1e38 is finite, but its square, and so the norm, is not."""
    model = Model()
    optimizer = build_optimizer(config, model)
    train(model, 1, lambda _: optimizer.step())
    loss(model, 1).backward()
    assert model.head.weight.grad is not None
    model.head.weight.grad[0, 0] = value
    assert not torch.isfinite(clip_gradients(model, max_norm))
    optimizer.step()
    tensors = [*model.parameters(), *(value for slots in optimizer.state.values() for value in slots.values())]
    assert all(bool(tensor.isfinite().all()) for tensor in tensors)
