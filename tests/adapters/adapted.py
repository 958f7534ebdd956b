"""Adapter sections and adapted models small enough for a test."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pretune.adapters.config import AdapterConfig
from pretune.core.config import Section, validate

_COMMON = {"rank": 4, "alpha": 6.0, "dropout": 0.0, "targets": ["all"], "init_from": None}
_OWN: dict[str, dict[str, Any]] = {
    "lora": {"rslora": False, "init": "zero", "lr_ratio": 1.0},
    "dora": {"rslora": False, "init": "zero", "lr_ratio": 1.0},
    "loha": {},
    "lokr": {"factor": None},
}


class _Run(Section):
    adapter: AdapterConfig


def adapter_section(kind: str, **changes: Any) -> AdapterConfig:
    """An adapter's section, with `changes` to its keys."""
    return validate(_Run, {"adapter": {**_COMMON, **_OWN[kind], "kind": kind, **changes}}).adapter


def perturb(model: nn.Module, scale: float = 0.1) -> None:
    """Move every adapter parameter away from its initial value, as training would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
