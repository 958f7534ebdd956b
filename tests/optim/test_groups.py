"""Which parameters are trained, and in which group."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from optimizer_sections import EVERY_OPTIMIZER, NAMES, muon
from tiny import tiny_model
from torch import nn

from pretune.core.config import ConfigError
from pretune.optim.config import OptimizerConfig
from pretune.optim.groups import trained_parameters
from pretune.optim.optimizers import build_optimizer


class GridNorm(nn.Module):
    """A norm with one scale per head: two-dimensional, but not a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 4))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.convolution = nn.Conv1d(8, 8, 3, bias=False)
        self.norm = nn.LayerNorm(8)
        self.head_norm = GridNorm()
        self.values = nn.Embedding(10, 8)
        self.scale = nn.Parameter(torch.ones(()))


class Model(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.layers = nn.ModuleList([Block()])
        self.norm = nn.RMSNorm(8)
        self.head = nn.Linear(8, 10, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


every_optimizer = pytest.mark.parametrize("config", EVERY_OPTIMIZER, ids=NAMES)


def roles(model: nn.Module) -> dict[str, str]:
    return {one.name: one.role for one in trained_parameters(model)}


def test_roles():
    assert roles(Model(tied=False)) == {
        "embedding.weight": "embedding",
        "layers.0.scale": "vector",
        "layers.0.qkv.weight": "hidden",
        "layers.0.qkv.bias": "vector",
        "layers.0.convolution.weight": "head",
        "layers.0.norm.weight": "vector",
        "layers.0.norm.bias": "vector",
        "layers.0.head_norm.weight": "vector",
        "layers.0.values.weight": "embedding",
        "norm.weight": "vector",
        "head.weight": "head",
    }


@pytest.mark.parametrize("tied", [False, True])
def test_the_transformers_parameters_are_what_their_names_say(tied: bool):
    for name, role in roles(tiny_model(tied_embeddings=tied)).items():
        match name.split("."):
            case ["layers", _, "attention" | "mlp", _, "weight"] if "norm" not in name:
                assert role == "hidden", name
            case ["embedding" | "head" as module, "weight"]:
                assert role == module
            case _:
                assert role == "vector", name


def test_tied_embeddings_appear_once():
    assert roles(Model(tied=True)).keys() == roles(Model(tied=False)).keys() - {"head.weight"}


@every_optimizer
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_in_exactly_one_group(config: OptimizerConfig, tied: bool):
    model = Model(tied)
    optimizer = build_optimizer(config, model)
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(model.parameters())
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert [id(dict(model.named_parameters())[name]) for name in names] == [id(parameter) for parameter in grouped]


@every_optimizer
def test_only_matrices_decay(config: OptimizerConfig):
    for group in build_optimizer(config, Model(tied=False)).param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            matrix = parameter.ndim >= 2 and "norm" not in name
            assert (group["weight_decay"] > 0) == matrix, name


@every_optimizer
def test_frozen_parameters_are_left_out(config: OptimizerConfig):
    model = Model(tied=True)
    model.requires_grad_(False)
    model.layers[0].get_submodule("qkv").requires_grad_(True)
    optimizer = build_optimizer(config, model)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == ["layers.0.qkv.bias", "layers.0.qkv.weight"]


@every_optimizer
def test_nothing_to_train_is_an_error(config: OptimizerConfig):
    with pytest.raises(ConfigError, match="nothing to train"):
        build_optimizer(config, Model(tied=False).requires_grad_(False))


def freeze_all_but_head(model: Model) -> None:
    model.requires_grad_(False)
    model.head.requires_grad_(True)


def freeze_all_but_qkv_weight(model: Model) -> None:
    model.requires_grad_(False)
    model.layers[0].get_submodule("qkv").get_parameter("weight").requires_grad_(True)


@pytest.mark.parametrize(
    ("freeze", "message"), [(freeze_all_but_head, "is trainable; use adamw"), (freeze_all_but_qkv_weight, None)]
)
def test_muon_needs_hidden_matrices_and_nothing_else(freeze: Callable[[Model], None], message: str | None):
    model, config = Model(tied=False), muon()
    freeze(model)
    if message:
        with pytest.raises(ConfigError, match=message):
            build_optimizer(config, model)
    else:
        assert len(build_optimizer(config, model).param_groups) == 1


def test_names_are_free_of_what_compile_adds():
    compiled = torch.compile(Model(tied=False), backend="eager")
    assert isinstance(compiled, nn.Module)
    assert any(name.startswith("_orig_mod.") for name, _ in compiled.named_parameters())
    assert roles(compiled) == roles(Model(tied=False))
