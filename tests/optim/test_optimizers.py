"""Optimizers: equal to the libraries' own, called directly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lion_pytorch
import pytest
import torch
from optimizer_sections import EVERY_OPTIMIZER, NAMES, adamw, adamw_8bit, lion, muon, normuon
from torch import Tensor, nn
from torch.optim import Optimizer

from pretune.launch.groups import options
from pretune.optim.config import LinearConfig, OptimizerConfig
from pretune.optim.groups import Trained
from pretune.optim.muon import BatchedMuon, orthogonalize
from pretune.optim.optimizers import (
    build_optimizer,
    clip_gradients,
    compile_update,
    compiles_update,
    set_progress,
    update,
)

ADAMW, LION, MUON = adamw(), lion(), muon()
SCHEDULE = LinearConfig.model_validate({"kind": "linear", "warmup": 0.0, "initial": 0.0, "final": 0.0})
every_optimizer = pytest.mark.parametrize("config", EVERY_OPTIMIZER, ids=NAMES)
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
    optimizer = build_optimizer(config, model, dtype=torch.bfloat16)  # torch's Muon supports no other

    def update(step: int) -> None:
        set_progress(optimizer, config, SCHEDULE, 1 - FACTORS[step])
        optimizer.step()

    return train(model, len(FACTORS), update)


def train_reference(make: Callable[[Model], list[tuple[Optimizer, list[float]]]]) -> dict[str, Tensor]:
    """Train with the optimizers built by `make`, each with the peak learning rates of its groups."""
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

    torch.testing.assert_close(train_ours(ADAMW), train_reference(make), rtol=1e-5, atol=1e-7)  # fused against a loop


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

    # The two matrices have one shape and are orthogonalized together, which rounds differently.
    torch.testing.assert_close(train_ours(MUON), train_reference(make), rtol=0, atol=1e-4)


def test_every_optimizer_is_tested_below() -> None:
    assert {section.kind for section in EVERY_OPTIMIZER} == set(options("optimizer"))


@every_optimizer
def test_the_learning_rate_reaches_every_group_and_the_sections_own_is_returned(config: OptimizerConfig):
    optimizer = build_optimizer(config, Model())
    assert set_progress(optimizer, config, SCHEDULE, 0.5) == pytest.approx(0.005)
    assert set_progress(optimizer, config, SCHEDULE, 0.75) == pytest.approx(0.0025)  # of the peak, not the current
    for group in optimizer.param_groups:
        assert float(group["lr"]) == pytest.approx(0.25 * group["peak_lr"])
    model = Model()
    optimizer = build_optimizer(config, model)
    before = copy.deepcopy(model.state_dict())
    loss(model, 0).backward()
    set_progress(optimizer, config, SCHEDULE, 1.0)
    optimizer.step()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@every_optimizer
def test_weight_decay_goes_to_its_final_value(config: OptimizerConfig):
    config = config.model_copy(update={"weight_decay_final": 0.25})
    optimizer = build_optimizer(config, Model())
    for progress, factor in ((0.0, 1.0), (0.5, 0.625), (1.0, 0.25)):
        set_progress(optimizer, config, SCHEDULE, progress)
        for group in optimizer.param_groups:
            assert float(group["weight_decay"]) == pytest.approx(factor * group["peak_weight_decay"])
    neutral = config.model_copy(update={"weight_decay_final": 1.0})
    set_progress(optimizer, neutral, SCHEDULE, 1 / 3)
    assert all(float(group["weight_decay"]) == pytest.approx(group["peak_weight_decay"], rel=1e-7)
               for group in optimizer.param_groups)  # fmt: skip


def test_momentum_warms_up():
    config = muon(momentum=0.95, momentum_initial=0.85, momentum_warmup=0.2)
    optimizer = build_optimizer(config, Model())
    for progress, momentum in ((0.0, 0.85), (0.1, 0.9), (0.2, 0.95), (0.7, 0.95)):
        set_progress(optimizer, config, SCHEDULE, progress)
        assert [group.get("momentum") for group in optimizer.param_groups] == [
            pytest.approx(momentum),
            None,
            None,
            None,
        ]


@every_optimizer
def test_state_dicts_go_round(config: OptimizerConfig):
    """torch's own way of saving an optimizer works for ours too."""
    model = Model()
    optimizer = build_optimizer(config, model)
    train(model, 2, lambda _: optimizer.step())
    twin = copy.deepcopy(model)
    other = build_optimizer(config, twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    torch.testing.assert_close(
        train(model, 2, lambda _: optimizer.step()), train(twin, 2, lambda _: other.step()), rtol=0, atol=0
    )


def batched(
    weights: list[nn.Parameter], rows: tuple[int, ...] | None = None, neuron_beta=None, cautious_decay=False, **settings
) -> BatchedMuon:
    """Ours, in the precision of torch's."""
    trained = [Trained("", weight, "hidden", rows or (len(weight),)) for weight in weights]
    switches = {"dtype": torch.bfloat16, "neuron_beta": neuron_beta, "cautious_decay": cautious_decay}
    return BatchedMuon(weights, trained, **switches, **settings)


def hidden_update(steps: int, neuron_beta: float | None, cautious_decay: bool, **settings: Any) -> Tensor:
    """A matrix after `BatchedMuon`, which gets gradients that do not depend on it."""
    generator = torch.Generator().manual_seed(3)
    weight = nn.Parameter(torch.randn(24, 8, generator=generator))
    optimizer = batched([weight], neuron_beta=neuron_beta, cautious_decay=cautious_decay, **settings)
    for _ in range(steps):
        weight.grad = torch.randn(24, 8, generator=generator) * torch.arange(1.0, 25.0)[:, None]
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjustment", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(24, 8), (8, 24)])
def test_a_matrix_alone_without_switches_is_torchs_muon(nesterov: bool, adjustment: str, shape: tuple[int, int]):
    settings = {"lr": 0.1, "weight_decay": 0.3, "nesterov": nesterov, "adjust_lr_fn": adjustment}
    weights = []
    for make in (torch.optim.Muon, batched):
        generator = torch.Generator().manual_seed(3)
        weight = nn.Parameter(torch.randn(shape, generator=generator))
        optimizer = make([weight], **settings)
        for _ in range(3):
            weight.grad = torch.randn(shape, generator=generator)
            optimizer.step()
        weights.append(weight.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.parametrize("neuron_beta", [None, 0.9])
def test_matrices_of_a_shape_and_pieces_of_one_parameter_move_as_each_alone(neuron_beta: float | None):
    generator = torch.Generator().manual_seed(3)
    shapes, steps = ((24, 8), (8, 8), (8, 8), (5, 8)), 3
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(steps)]

    def moved(matrices: list[Tensor], rows: tuple[int, ...] | None, gradient: Callable[[int], list[Tensor]]):
        weights = [nn.Parameter(matrix.clone()) for matrix in matrices]
        optimizer = batched(weights, rows, neuron_beta, lr=0.1)
        for step in range(steps):
            for weight, one in zip(weights, gradient(step), strict=True):
                weight.grad = one
            optimizer.step()
        return [weight.detach() for weight in weights]

    alone = [moved([start[i]], None, lambda step, i=i: [gradients[step][i]])[0] for i in range(len(shapes))]
    together = moved(start, None, lambda step: gradients[step])
    fused = moved([torch.cat(start)], (24, 8, 8, 5), lambda step: [torch.cat(gradients[step])])
    torch.testing.assert_close(together, alone, rtol=0, atol=5e-3)  # bfloat16 rounds differently in a batch
    torch.testing.assert_close(fused[0], torch.cat(together), rtol=0, atol=0)


def test_normuon_is_the_papers_formula():
    """arXiv:2510.05491, algorithm 1, in float64, on the orthogonalized matrices of torch's Muon."""
    settings = {"lr": 0.1, "weight_decay": 0.3, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    ours = hidden_update(3, 0.8, False, **settings)

    generator, rows, columns = torch.Generator().manual_seed(3), 24, 8
    theta, square = torch.randn(rows, columns, generator=generator).double(), torch.zeros(rows, 1).double()
    probe = nn.Parameter(torch.zeros(rows, columns))
    # From zero, without decay and at a rate of 1, Muon's step gives the orthogonalized matrix, scaled.
    torchs = torch.optim.Muon([probe], **{**settings, "lr": 1.0, "weight_decay": 0.0})
    for _ in range(3):
        probe.grad = torch.randn(rows, columns, generator=generator) * torch.arange(1.0, 25.0)[:, None]
        probe.data.zero_()
        torchs.step()
        orthogonal = -probe.detach().double() / (0.2 * rows**0.5)
        square = 0.8 * square + 0.2 * orthogonal.square().mean(1, keepdim=True)
        normalized = orthogonal / square.sqrt()
        rate = 0.2 * 0.1 * (rows * columns) ** 0.5 / normalized.norm()
        exact = orthogonal.norm() / columns**0.5  # 1 if the orthogonalization is exact, as the paper assumes
        theta = theta - 0.1 * 0.3 * theta - rate * exact * normalized
    torch.testing.assert_close(ours.double(), theta, rtol=1e-3, atol=1e-4)


def test_neurons_move_alike():
    """Rows whose gradients differ in size by a factor of 24 get updates of one size, in total as large as Muon's."""
    start = hidden_update(0, None, False)
    plain, even = (hidden_update(1, beta, False, lr=1.0, weight_decay=0.0) - start for beta in (None, 0.9))
    assert plain.norm(dim=1).max() > 1.5 * plain.norm(dim=1).min()
    torch.testing.assert_close(even.norm(dim=1), even.norm(dim=1).mean().expand(24), rtol=1e-4, atol=0)
    torch.testing.assert_close(even.norm(), plain.norm(), rtol=1e-4, atol=0)


def test_cautious_decay_takes_only_where_the_update_does():
    start = hidden_update(0, None, False)
    update = hidden_update(1, None, False, lr=0.1, weight_decay=0.0) - start
    cautious = hidden_update(1, None, True, lr=0.1, weight_decay=2.0) - start
    shrinks = update * start < 0
    assert 0.2 < shrinks.float().mean() < 0.8
    torch.testing.assert_close(cautious, update - 0.1 * 2.0 * start * shrinks)


def test_8bit_adamw_is_nearly_adamw_and_compiles_once():
    counters = torch._dynamo.utils.counters["stats"]

    def train_wide(config: OptimizerConfig) -> Tensor:
        torch.manual_seed(2)
        layer = nn.Linear(64, 64, bias=False)  # the smallest parameter that it keeps in 8 bits has 4,096 weights
        optimizer = build_optimizer(config, layer)
        before = layer.weight.detach().clone()
        if compiles_update(optimizer):
            compile_update(optimizer)
        assert torch.equal(layer.weight, before)
        assert not optimizer.state
        compiled = counters["unique_graphs"]
        for step in range(8):
            set_progress(optimizer, config, SCHEDULE, step / 8)
            layer.weight.grad = torch.randn(64, 64) + before
            optimizer.step()
        assert counters["unique_graphs"] == compiled, "rates and decays that move do not compile it again"
        return layer.weight.detach() - before

    settings = {"lr": 1e-3, "weight_decay_final": 0.5}
    eight = train_wide(adamw_8bit(**settings))
    assert counters["unique_graphs"] > 0
    exact = train_wide(adamw(**settings))
    assert (eight - exact).norm() < 0.02 * exact.norm()


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


def test_gradients_of_a_scaled_loss_are_divided_before_they_are_clipped():
    ours, reference = Model(), Model()
    for model, factor in ((ours, 2.0**10), (reference, 1.0)):
        (factor * loss(model, 0)).backward()
    assert clip_gradients(ours, 0.05, 2.0**10) == clip_gradients(reference, 0.05)
    for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)


def everything(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """A copy of weights and state, step counters included."""
    state = [value for slots in optimizer.state.values() for value in slots.values() if isinstance(value, Tensor)]
    return [torch.as_tensor(tensor).detach().clone() for tensor in (*model.parameters(), *state)]


@every_optimizer
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("max_norm", [1.0, None])
def test_a_step_with_gradients_that_are_not_finite_changes_nothing(
    config: OptimizerConfig, value: float, max_norm: float | None
):
    """No weight, momentum, decay or counter changes. 1e38 is finite, but its square, and so the norm, is not."""
    model = Model()
    optimizer = build_optimizer(config, model)
    train(model, 1, lambda _: optimizer.step())
    before = everything(model, optimizer)
    loss(model, 1).backward()
    assert model.head.weight.grad is not None
    model.head.weight.grad[0, 0] = value
    norm = clip_gradients(model, max_norm)
    assert not torch.isfinite(norm)
    assert update(optimizer, norm) == 1
    for now, then in zip(everything(model, optimizer), before, strict=True):
        assert torch.equal(now, then)
    optimizer.zero_grad()
    loss(model, 1).backward()
    assert update(optimizer, clip_gradients(model, max_norm)) == 0
    assert not torch.equal(model.head.weight, before[-1])


@pytest.mark.parametrize("config", [adamw(), muon(), normuon(cautious_decay=True)], ids=["adamw", "muon", "normuon"])
@pytest.mark.parametrize("first", [True, False], ids=["the first step", "a later step"])
def test_a_step_can_be_left_undone_on_the_device(config: OptimizerConfig, first: bool):
    """As on CUDA, where the host does not wait: found_inf is 1 or 0, and the step is called either way."""
    model, plain = Model(), Model()
    optimizer, reference = build_optimizer(config, model), build_optimizer(config, plain)
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    if not first:
        train(model, 2, lambda _: optimizer.step())
        train(plain, 2, lambda _: reference.step())
        torch.testing.assert_close(everything(model, optimizer), everything(plain, reference), rtol=1e-5, atol=1e-7)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # NaN has been replaced by then
    optimizer.step()
    for parameter, then in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, then)
    # The following steps are the same as without it.
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    train(model, 3, lambda _: optimizer.step())
    train(plain, 3, lambda _: reference.step())
    torch.testing.assert_close(everything(model, optimizer), everything(plain, reference), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 0.01), (torch.bfloat16, 0.08)], ids=str
)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_orthogonalizing_follows_the_precision(dtype: torch.dtype, tolerance: float, size: float):
    """Against the same polynomial of the singular values in float64, also for gradients far outside float16's range."""
    generator = torch.Generator().manual_seed(3)
    matrices = [size * torch.randn(24, 40, generator=generator) for _ in range(2)]
    coefficients = (3.4445, -4.775, 2.0315)
    for found, matrix in zip(orthogonalize(matrices, dtype, coefficients, 5, 1e-7), matrices, strict=True):
        assert found.dtype == dtype
        left, values, right = torch.linalg.svd(matrix.double() / matrix.double().norm(), full_matrices=False)
        for _ in range(5):
            powers = [factor * values ** (2 * power + 1) for power, factor in enumerate(coefficients)]
            values = torch.stack(powers).sum(0)
        torch.testing.assert_close(found.double(), left @ torch.diag(values) @ right, rtol=0, atol=tolerance)
