"""Fake quantization: the model computes as if its weights were integers, but keeps them in full precision.

Parameter names, in the model and in checkpoints, do not change. Each layer or table that will be stored as integers
gets one of the classes below. The head's inputs are rounded as they leave the final norm, because a loss may use the
head's matrix without calling the head. With an adapter, the sum of weight and update is rounded, because the merged
weight is what will be stored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretune.quantization.config import FakeQuantizationConfig
from pretune.quantization.rounding import Grid, grids, round_activations, round_weight, rounds_activations


class FakeQuantizedLinear(nn.Linear):
    """A linear layer that rounds its inputs (if `rounds_inputs`) and its weight (to `grid`; None: already rounded).

    It rounds only while `fake_quant_enabled` is set. An adapter on it passes the sum of weight and update to
    `multiply`.
    """

    grid: Grid | None
    fake_quant_enabled: bool
    rounds_inputs: bool

    def forward(self, input: Tensor) -> Tensor:
        return self.multiply(input, self.weight)

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [..., D] times a weight [E, D] -> [..., E]."""
        if self.fake_quant_enabled and self.grid is not None:
            weight = round_weight(weight, self.grid)
        if self.fake_quant_enabled and self.rounds_inputs:
            x = round_activations(x)
        return F.linear(x, weight, self.bias)


class _FakeQuantizedWeight(nn.Module):
    """A head or table whose `weight` attribute returns the rounded weight, for code that multiplies with it
    directly."""

    grid: Grid | None
    fake_quant_enabled: bool

    @property
    def weight(self) -> Any:
        return self._rounded(self._parameters["weight"])

    def _rounded(self, weight: Any) -> Any:
        return round_weight(weight, self.grid) if self.fake_quant_enabled and self.grid is not None else weight


class FakeQuantizedHead(_FakeQuantizedWeight, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """An untied head; its inputs are already rounded."""


class FakeQuantizedEmbedding(_FakeQuantizedWeight, nn.Embedding):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A table of vectors, possibly also the head. Groups lie within rows, so only rows that are looked up are
    rounded."""

    def forward(self, input: Tensor) -> Tensor:
        return self._rounded(F.embedding(input, self._parameters["weight"]))  # pyright: ignore[reportArgumentType]


def prepare_qat(model: nn.Module, config: FakeQuantizationConfig, enabled: bool = True) -> None:
    """Make `model` compute what its result of `convert` would. Attach an adapter before.

    `enabled`: whether fake quantization is on at first; see enable_fake_quantization.
    """
    active, stored = rounds_activations(config), grids(model, config)
    for name, grid in stored.items():
        layer: Any = model.get_submodule(name)
        is_table = isinstance(layer, nn.Embedding)
        if is_table:
            layer.__class__ = FakeQuantizedEmbedding
        elif name == "head":
            layer.__class__ = FakeQuantizedHead
        else:
            layer.__class__ = FakeQuantizedLinear
            layer.rounds_inputs = active
        layer.grid, layer.fake_quant_enabled = grid, enabled
    head = "head" if getattr(model, "head", None) is not None else "embedding"
    if active and head in stored:
        norm: Any = model.get_submodule("norm")
        norm.fake_quant_enabled = enabled
        norm.register_forward_hook(_round_output)


def enable_fake_quantization(model: nn.Module, enabled: bool) -> None:
    """Switch fake quantization on or off."""
    for module in _switches(model):
        module.fake_quant_enabled = enabled


def fake_quantization_enabled(model: nn.Module) -> bool:
    """Whether fake quantization is on."""
    return any(module.fake_quant_enabled for module in _switches(model))


@contextlib.contextmanager
def fake_quantization(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Switch fake quantization on or off for the duration of the block."""
    before = [module.fake_quant_enabled for module in _switches(model)]
    enable_fake_quantization(model, enabled)
    try:
        yield
    finally:
        for module, was in zip(_switches(model), before, strict=True):
            module.fake_quant_enabled = was


@torch.no_grad()
def round_weights_in_place(model: nn.Module) -> None:
    """Round the weights of a prepared model permanently: it computes the same, faster, but cannot be trained
    further."""
    for module in _switches(model):
        if getattr(module, "grid", None) is not None:
            weight = module._parameters["weight"]
            weight.copy_(round_weight(weight, module.grid))
            module.grid = None
    model.requires_grad_(False)


def _switches(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if "fake_quant_enabled" in vars(module))


def _round_output(module: nn.Module, _: object, output: Tensor) -> Tensor:
    return round_activations(output) if module.fake_quant_enabled else output
