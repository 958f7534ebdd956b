"""Assemble the parts of a run in one visible order:

    tokenizer -> data -> model (weights, adapter, quantization) -> frozen model -> EMA -> precision -> optimizer
    -> compiled loss

run/model.py builds the model itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from pretune.compute.device import pick_device
from pretune.compute.precision import dtype_of
from pretune.core.batch import Batch
from pretune.data.shards import prepare
from pretune.model.build import Model
from pretune.optim.optimizers import build_optimizer
from pretune.run.config import RunConfig
from pretune.run.folder import RunFolder, cache_folder
from pretune.run.frozen_models import with_frozen
from pretune.run.losses import training_loss
from pretune.run.model import apply_precision, evaluation_model, learning_rate_factors, training_model
from pretune.run.parts import Parts
from pretune.run.tokenizer import assemble_tokenizer
from pretune.training.config import EMAConfig
from pretune.training.ema import EMA

InTurn = Callable[[str], AbstractContextManager[object]]
"""A context in which processes work one after the other; the name of what they do."""


def at_once(what: str) -> AbstractContextManager[object]:
    """A process alone need not wait for its turn."""
    return nullcontext()


@dataclass(frozen=True)
class Training:
    """Everything that the training loop needs."""

    parts: Parts
    ema: EMA[Model] | None
    optimizer: Optimizer
    loss_of: Callable[[Batch], dict[str, Tensor]]
    """Compiled at its first call."""


def assemble_training(config: RunConfig, newest: Path | None, in_turn: InTurn = at_once) -> Training:
    """All parts of a run for training, in the order given at the top of this file. `newest`: the run's newest
    checkpoint, if any, which the caller loads into them afterwards. in_turn: a context for what writes to the cache."""
    parts = _parts(config, lambda device: training_model(config, device, newest), in_turn)
    with in_turn("the frozen model"):
        parts = with_frozen(config, parts)
    ema = moving_average(config.ema, parts.model)
    apply_precision(config.precision, parts.model)
    # Last, so that the optimizer gets the parameters that are actually trained.
    dtype = dtype_of(config.precision.activations)
    factors = learning_rate_factors(config.adapter, parts.model)
    optimizer = build_optimizer(config.optimizer, parts.model, factors, dtype)
    return Training(parts, ema, optimizer, training_loss(config, parts))


def assemble_evaluation(config: RunConfig, run: RunFolder) -> Parts:
    """All parts of a finished run, for tasks that evaluate it. The frozen model of its objective is left out: it may be
    a second model, and not all tasks need it."""
    return _parts(config, lambda device: evaluation_model(config, run, device))


def _parts(config: RunConfig, model_on: Callable[[torch.device], Model], in_turn: InTurn = at_once) -> Parts:
    device = pick_device(config.device)
    with in_turn("the data"):
        tokenizer = assemble_tokenizer(config)
        data = prepare(config.data, tokenizer, cache_folder())
    return Parts(device, tokenizer, data, model_on(device))


def moving_average(config: EMAConfig, model: Model) -> EMA[Model] | None:
    """The EMA of the trained weights of `model`, which must be in its final form; None if the run has no EMA."""
    return None if config.decay is None else EMA(model, config.decay, config.warmup)
