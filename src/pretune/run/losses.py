"""The training loss and the evaluation scores of an assembled run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from pretune.compute.compilation import compile_step, keep_freed_memory
from pretune.compute.config import PrecisionConfig
from pretune.compute.precision import autocast
from pretune.core.batch import Batch
from pretune.core.terminal import warn
from pretune.model.build import Model
from pretune.model.transformers_model.model import TransformersModel
from pretune.objectives import language_modeling
from pretune.objectives.language_modeling import TokenScores
from pretune.objectives.objective import Objective, frozen_outputs, objective_of
from pretune.run.config import RunConfig
from pretune.run.parts import Parts

T = TypeVar("T")


def training_loss(config: RunConfig, parts: Parts, compiled: bool) -> Callable[[Batch], dict[str, Tensor]]:
    """Sums over the scored items of a micro-batch, by name, in the run's precision; `loss` is minimized."""
    objective, fill = _objective(config, parts), _filling(config, parts, compiled)

    def sums(batch: Batch) -> dict[str, Tensor]:
        return objective.sums(parts.model, batch)

    if parts.device.type == "cpu":
        keep_freed_memory()
    loss = _compiled(parts, sums, config.precision.activation_checkpointing) if compiled else sums

    def in_precision(batch: Batch) -> dict[str, Tensor]:
        with autocast(config.precision, parts.device):
            return loss(fill(batch.to(parts.device)))

    return in_precision


def scorer(config: RunConfig, parts: Parts, compiled: bool = False) -> Callable[[Model, Batch], Any]:
    """The objective's scores of each item in a batch, by any model of the run, in evaluation mode and in the run's
    precision. They can be compiled, for the shapes of the batches that they get."""
    score = _objective(config, parts).scorer(partial(_compiled, parts) if compiled else None)
    return _measuring(config.precision, parts.device, _filling(config, parts, compiled), score)


def token_scorer(config: RunConfig, parts: Parts) -> Callable[[Model, Batch], TokenScores]:
    """The same for each token, whatever the objective."""
    score = language_modeling.token_scorer(config.stage.objective.chunk_tokens)
    return _measuring(config.precision, parts.device, lambda batch: batch, score)


def _objective(config: RunConfig, parts: Parts) -> Objective:
    return objective_of(config.stage.objective, parts.frozen and parts.frozen.model)


def _filling(config: RunConfig, parts: Parts, compiled: bool) -> Callable[[Batch], Batch]:
    """A function that adds to a batch what the frozen model, if there is one, says of it."""
    frozen = parts.frozen
    if frozen is None:
        return lambda batch: batch
    compiles = partial(_compiled, parts) if compiled else None
    outputs = frozen_outputs(config.stage.objective, config.model.vocab_size, compiles)
    return lambda batch: frozen.fill(batch, outputs)


def _measuring(
    precision: PrecisionConfig,
    device: torch.device,
    fill: Callable[[Batch], Batch],
    score: Callable[[Model, Batch], T],
) -> Callable[[Model, Batch], T]:
    def measured(model: Model, batch: Batch) -> T:
        with _evaluating(model), autocast(precision, device):
            return score(model, fill(batch.to(device)))

    return measured


def _compiled(parts: Parts, computation: Callable[..., T], checkpointed: bool = False) -> Callable[..., T]:
    """A part of a run's computation, compiled. torch's compiler does not take every model that transformers builds: one
    that fails goes on uncompiled, and a line says so."""
    compiled = compile_step(computation, checkpointed)
    if not isinstance(parts.model, TransformersModel):
        return compiled
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    failed = False

    def run(*given: Any) -> T:
        nonlocal failed
        if not failed:
            try:
                return compiled(*given)
            except (TorchDynamoException, InductorError) as error:
                failed = True
                warn(f"note: not compiled: torch's compiler does not take this model ({str(error).splitlines()[0]})")
        return computation(*given)

    return run


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():  # torchao's 8-bit layers fail in inference_mode under autocast
            yield
    finally:
        model.train(was_training)
