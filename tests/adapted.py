"""Adapter sections and adapted models small enough for a test."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pretune.adapters.attach import adapted_layers
from pretune.adapters.config import AdapterConfig
from pretune.core.config import Section, validate

_COMMON = {"rank": 4, "alpha": 6.0, "dropout": 0.0, "targets": ["all"], "train_embeddings": "auto", "init_from": None}
_OWN: dict[str, dict[str, Any]] = {
    "lora": {"rslora": False, "init": "zero", "lr_ratio": 1.0},
    "dora": {"rslora": False, "init": "zero", "lr_ratio": 1.0},
    "loha": {},
    "lokr": {"factor": None},
}


FORMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora rsLoRA": {"kind": "lora", "rslora": True},
    "lora orthogonal": {"kind": "lora", "init": "orthogonal"},
    "lora pissa": {"kind": "lora", "init": "pissa"},
    "dora": {},
    "loha": {"rank": 2},
    "loha of a high rank": {"kind": "loha", "rank": 6},
    "lokr": {"rank": 2},
    "lokr of a high rank": {"kind": "lokr", "rank": 32},
    "lokr with a factor": {"kind": "lokr", "rank": 3, "factor": 4},
}
"""Each way in which an adapter computes: its kind, unless that is its name, and what it sets."""


class _Run(Section):
    adapter: AdapterConfig


def adapter_section(kind: str, **changes: Any) -> AdapterConfig:
    """An adapter's section, with `changes` to its keys."""
    return validate(_Run, {"adapter": {**_COMMON, **_OWN[kind], "kind": kind, **changes}}).adapter


def of_form(form: str, **changes: Any) -> AdapterConfig:
    """The section of one of FORMS, with `changes` to its keys."""
    return adapter_section(**{"kind": form, **FORMS[form], **changes})


def use_layers_of_peft(model: nn.Module) -> None:
    """Make an adapted model compute with peft's own layers."""
    for layer in adapted_layers(model).values():
        layer.__class__ = type(layer).__base__  # pyright: ignore
    assert all(type(layer).__module__.startswith("peft.") for layer in adapted_layers(model).values())


def perturb(model: nn.Module, scale: float = 0.1) -> None:
    """Move every adapter parameter away from its initial value, as training would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
