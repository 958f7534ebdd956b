"""Fake quantization: a model that computes as if its weights were stored as integers, and keeps all their bits.

Parameters keep their names, and so do checkpoints. A layer or table that is stored as integers becomes one of the
classes below; what goes into the head is rounded as it leaves the final norm, because a loss may take the head's matrix
instead of calling it. With an adapter, it is the sum of weight and update that is rounded: the merged weight, which is
what will be stored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretune.quantization.config import RoundingConfig
from pretune.quantization.rounding import Grid, grids, round_activations, round_weight, rounds_activations


class RoundedLinear(nn.Linear):
    """A linear layer that rounds its inputs (`rounds_inputs`) and its weight (to `grid`; None: it is rounded already).

    It does so where `rounding` is set. An adapter beside it hands the sum of weight and update to `multiply`.
    """

    grid: Grid | None
    rounding: bool
    rounds_inputs: bool

    def forward(self, input: Tensor) -> Tensor:
        return self.multiply(input, self.weight)

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [..., D] times a weight [E, D] -> [..., E]."""
        if self.rounding and self.grid is not None:
            weight = round_weight(weight, self.grid)
        if self.rounding and self.rounds_inputs:
            x = round_activations(x)
        return F.linear(x, weight, self.bias)


class _ReadRounded(nn.Module):
    """A module whose `weight` reads as it will be stored: a head or a table, which others multiply with."""

    grid: Grid | None
    rounding: bool

    @property
    def weight(self) -> Any:
        return self._rounded(self._parameters["weight"])

    def _rounded(self, weight: Any) -> Any:
        return round_weight(weight, self.grid) if self.rounding and self.grid is not None else weight


class RoundedHead(_ReadRounded, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A head with a matrix of its own; its inputs come rounded."""


class RoundedEmbedding(_ReadRounded, nn.Embedding):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A table of vectors, and perhaps the head. Groups lie within rows, so that only what is looked up is rounded."""

    def forward(self, input: Tensor) -> Tensor:
        return self._rounded(F.embedding(input, self._parameters["weight"]))  # pyright: ignore[reportArgumentType]


def prepare(model: nn.Module, config: RoundingConfig, rounding: bool = True) -> None:
    """Let `model` compute as what `convert` would make of it. An adapter must be on it by then.

    `rounding` says whether it begins with it; see set_rounding.
    """
    active, stored = rounds_activations(config), grids(model, config)
    for name, grid in stored.items():
        layer: Any = model.get_submodule(name)
        is_table = isinstance(layer, nn.Embedding)
        if is_table:
            layer.__class__ = RoundedEmbedding
        elif name == "head":
            layer.__class__ = RoundedHead
        else:
            layer.__class__ = RoundedLinear
            layer.rounds_inputs = active
        layer.grid, layer.rounding = grid, rounding
    head = "head" if getattr(model, "head", None) is not None else "embedding"
    if active and head in stored:
        norm: Any = model.get_submodule("norm")
        norm.rounding = rounding
        norm.register_forward_hook(_round_output)


def set_rounding(model: nn.Module, rounding: bool) -> None:
    """From now on round, or compute with all bits."""
    for module in _switches(model):
        module.rounding = rounding


def rounds(model: nn.Module) -> bool:
    """Whether the model rounds at present."""
    return any(module.rounding for module in _switches(model))


@contextlib.contextmanager
def rounded(model: nn.Module, rounding: bool) -> Iterator[None]:
    """The model with or without rounding, for as long as the block lasts."""
    before = [module.rounding for module in _switches(model)]
    set_rounding(model, rounding)
    try:
        yield
    finally:
        for module, was in zip(_switches(model), before, strict=True):
            module.rounding = was


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Round the weights of a prepared model once and for all: it computes the same, faster, and cannot be trained."""
    for module in _switches(model):
        if getattr(module, "grid", None) is not None:
            weight = module._parameters["weight"]
            weight.copy_(round_weight(weight, module.grid))
            module.grid = None
    model.requires_grad_(False)


def _switches(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if "rounding" in vars(module))


def _round_output(module: nn.Module, _: object, output: Tensor) -> Tensor:
    return round_activations(output) if module.rounding else output
