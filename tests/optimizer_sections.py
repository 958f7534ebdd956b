"""Sections of optimizers, with every switch neutral."""

from __future__ import annotations

from typing import Any

from pretune.optim.config import AdamW8bitConfig, AdamWConfig, LionConfig, MuonConfig

BASE: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "weight_decay_final": 1.0, "clip_norm": None}
REST = {"embedding_lr": 0.3, "head_lr": 0.2, "scalar_lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.5}
_MUON: dict[str, Any] = {"momentum": 0.9, "momentum_initial": 0.85, "momentum_warmup": 0.0, "nesterov": True}
_MUON |= {"ns_steps": 4, "scale": "original", "neuron_beta": None, "cautious_decay": False, "adamw": REST}


def adamw(**changes: Any) -> AdamWConfig:
    return AdamWConfig.model_validate({"kind": "adamw", "betas": (0.9, 0.95), "eps": 1e-8, **BASE, **changes})


def adamw_8bit(**changes: Any) -> AdamW8bitConfig:
    settings = {"kind": "adamw_8bit", "betas": (0.9, 0.95), "eps": 1e-8, **BASE, **changes}
    return AdamW8bitConfig.model_validate(settings)


def lion(**changes: Any) -> LionConfig:
    return LionConfig.model_validate({"kind": "lion", "betas": (0.95, 0.98), **BASE, **changes})


def muon(**changes: Any) -> MuonConfig:
    return MuonConfig.model_validate({"kind": "muon", **_MUON, **BASE, **changes})


def normuon(**changes: Any) -> MuonConfig:
    """With both switches on."""
    return muon(**{"neuron_beta": 0.95, "cautious_decay": True, **changes})


EVERY_OPTIMIZER = [adamw(), adamw_8bit(), lion(), muon(), normuon()]
"""What tests of updates, groups, checkpoints and resumes go through."""

NAMES = ["adamw", "adamw_8bit", "lion", "muon", "normuon"]
