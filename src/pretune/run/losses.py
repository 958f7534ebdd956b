"""The training loss and the evaluation scores of an assembled run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
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
from pretune.objectives.objective import objective_of
from pretune.run.config import RunConfig
from pretune.run.parts import Parts, Reference

T = TypeVar("T")


def training_loss(config: RunConfig, parts: Parts) -> Callable[[Batch], dict[str, Tensor]]:
    """Sums over the scored items of a micro-batch, by name, compiled and in the run's precision; `loss` is
    minimized."""
    objective, reference = objective_of(config.stage.objective), parts.reference

    def sums(batch: Batch) -> dict[str, Tensor]:
        return objective.sums(parts.model, batch)

    if parts.device.type == "cpu":
        keep_freed_memory()
    compiled = sums
    if config.precision.compile:
        compiled = _compiled(parts, sums, config.precision.activation_checkpointing)
        reference = reference and replace(reference, log_probs=_compiled(parts, reference.log_probs))

    def in_precision(batch: Batch) -> dict[str, Tensor]:
        with autocast(config.precision, parts.device):
            batch = batch.to(parts.device)
            return compiled(batch if reference is None else reference.fill(batch))

    return in_precision


def scorer(config: RunConfig, parts: Parts, compiled: bool = False) -> Callable[[Model, Batch], Any]:
    """The objective's scores of each item in a batch, by any model of the run, in evaluation mode and in the run's
    precision. They can be compiled, for the shapes of the batches that they get."""
    objective, reference = objective_of(config.stage.objective), parts.reference
    if compiled and reference is not None:
        reference = replace(reference, log_probs=_compiled(parts, reference.log_probs))
    score = objective.scorer(partial(_compiled, parts) if compiled else None)
    return _measuring(config.precision, parts.device, reference, score)


def token_scorer(config: RunConfig, parts: Parts) -> Callable[[Model, Batch], TokenScores]:
    """The same for each token, whatever the objective."""
    score = language_modeling.token_scorer(config.stage.objective.chunk_tokens)
    return _measuring(config.precision, parts.device, None, score)


def _measuring(
    precision: PrecisionConfig,
    device: torch.device,
    reference: Reference | None,
    score: Callable[[Model, Batch], T],
) -> Callable[[Model, Batch], T]:
    def measured(model: Model, batch: Batch) -> T:
        with _evaluating(model), autocast(precision, device):
            batch = batch.to(device)
            return score(model, batch if reference is None else reference.fill(batch))

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
