"""Assemble the parts of a run in one visible order:

    tokenizer -> data -> model (weights, adapter, quantization) -> frozen model -> EMA -> precision -> sharding
    -> optimizer -> compiled loss

run/model.py builds the model itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from pretune.compute.compilation import compile_blocks
from pretune.compute.device import pick_device
from pretune.compute.precision import dtype_of
from pretune.core.batch import Batch
from pretune.data.shards import prepare
from pretune.model.build import Model
from pretune.optim.optimizers import build_optimizer
from pretune.parallel.processes import ALONE, Processes
from pretune.run.config import RunConfig
from pretune.run.folder import RunFolder, cache_folder
from pretune.run.frozen_models import with_frozen
from pretune.run.losses import training_loss
from pretune.run.model import apply_precision, evaluation_model, learning_rate_factors, training_model
from pretune.run.parts import Parts
from pretune.run.tokenizer import assemble_tokenizer
from pretune.training.config import EMAConfig
from pretune.training.ema import EMA


@dataclass(frozen=True)
class Training:
    """Everything that the training loop needs."""

    parts: Parts
    ema: EMA[Model] | None
    optimizer: Optimizer
    loss_of: Callable[[Batch], dict[str, Tensor]]
    """Compiled at its first call."""
    sharded: bool
    """Whether processes share out the parameters of the model and of its averages."""


def assemble_training(config: RunConfig, newest: Path | None, processes: Processes = ALONE) -> Training:
    """All parts of a run for training, in the order given at the top of this file. `newest`: the run's newest
    checkpoint, if any, which the caller loads into them afterwards."""
    parts = _parts(config, lambda device: training_model(config, device, newest), processes)
    with processes.main_first("the frozen model"):
        parts = with_frozen(config, parts)
    ema = moving_average(config.ema, parts.model)
    apply_precision(config.precision, parts.model)
    sharded = config.parallel.kind == "fsdp"
    if sharded:
        _shard(config, parts, ema, processes)
    # Last, so that the optimizer gets the parameters that are actually trained.
    dtype = dtype_of(config.precision.activations)
    factors = learning_rate_factors(config.adapter, parts.model)
    optimizer = build_optimizer(config.optimizer, parts.model, factors, dtype, processes.count > 1)
    loss_of = training_loss(config, parts, config.precision.compile and not sharded)
    return Training(parts, ema, optimizer, loss_of, sharded)


def _shard(config: RunConfig, parts: Parts, ema: EMA[Model] | None, processes: Processes) -> None:
    """Share the parameters of the model and of its averages out over the processes."""
    from pretune.parallel.fully_sharded import device_mesh, shard

    model, mesh = parts.model, device_mesh(config.parallel, processes, parts.device)
    if config.precision.compile:  # block by block: their weights come and go between them
        compile_blocks(model.layers, config.precision.activation_checkpointing)
    shard(model, model.layers, config.parallel, mesh)
    if ema is not None:
        shard(ema.model, ema.model.layers, config.parallel, mesh)
        ema.follow(model)


def assemble_evaluation(config: RunConfig, run: RunFolder) -> Parts:
    """All parts of a finished run, for tasks that evaluate it. The frozen model of its objective is left out: it may be
    a second model, and not all tasks need it."""
    return _parts(config, lambda device: evaluation_model(config, run, device))


def _parts(config: RunConfig, model_on: Callable[[torch.device], Model], processes: Processes = ALONE) -> Parts:
    device = pick_device(config.device)
    with processes.main_first("the data"):
        tokenizer = assemble_tokenizer(config)
        data = prepare(config.data, tokenizer, cache_folder())
    return Parts(device, tokenizer, data, model_on(device))


def moving_average(config: EMAConfig, model: Model) -> EMA[Model] | None:
    """The EMA of the trained weights of `model`, which must be in its final form; None if the run has no EMA."""
    return None if config.decay is None else EMA(model, config.decay, config.warmup)
