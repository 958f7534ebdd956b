"""The reference model of preference training: the model as it was at the start of the run.

It comes in three forms: a second, frozen model; the model in training with its adapter disabled; or its
log-probabilities of all pairs in the run's data, computed once and kept in the cache.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from pretune.data.loader import Loader
from pretune.objectives.objective import objective_of
from pretune.objectives.preference import num_pairs
from pretune.run.config import RunConfig
from pretune.run.frozen_tables import Row, Tables, with_tables
from pretune.run.model import adapted_model, apply_precision, quantize
from pretune.run.parts import Frozen, Parts


def with_reference(config: RunConfig, parts: Parts, validation_only: bool) -> Parts:
    """`parts` with the reference model of preference training, or with what it says of the data.

    Call it after the model's adapter and quantization, if any, are in place.
    """
    kind = config.reference
    if kind == "adapter_off":
        from pretune.adapters.attach import adapted_layers, switched_off

        if adapted_layers(parts.model):  # a finished run's adapter is merged, so a second model is needed
            return dataclasses.replace(parts, frozen=Frozen(parts.model, lambda: switched_off(parts.model)))
    # Include the adapter: one that starts with an update (PiSSA, or init_from) is part of the initial model.
    start = adapted_model(config, parts.device)
    weights = _fingerprint(start) if kind == "cached" else ""
    quantize(config.quantization, start)
    apply_precision(config.precision, start)
    frozen = Frozen(start.eval().requires_grad_(False), nullcontext)
    if kind != "cached":
        return dataclasses.replace(parts, frozen=frozen)
    tables = Tables(
        title="the reference's log-probabilities",
        depends_on={
            "weights": weights,
            "model": config.model.model_dump(),
            "arithmetic": [config.precision.compute, config.quantization.model_dump()],
        },
        rows=functools.partial(_rows, size=config.evaluation.micro_batch),
        frozen=lambda: frozen,
        smaller="set stage.objective.reference=model",
    )
    return with_tables(config, parts, tables, validation_only)


def check_first_loss(config: RunConfig, loss: Tensor, pairs: int) -> None:
    """Raise RuntimeError unless the first loss of preference training is ln 2: at the start, model and reference are
    equal.

    loss: of the first step, summed over its pairs. In 16 bits, training and reference passes round differently.
    """
    expected = objective_of(config.stage.objective).first_loss
    if expected is None or not pairs:
        return
    found, tolerance = loss.item() / pairs, 1e-3 if config.precision.compute == "float32" else 0.05
    if not abs(found - expected) < tolerance:
        raise RuntimeError(
            f"the first loss is {found:.6f}, not ln 2 = {expected:.6f}: the reference is not the model that the run "
            f"starts from (stage.init_from={config.stage.init_from}, stage.objective.reference={config.reference})"
        )


def _rows(loader: Loader, size: int) -> dict[str, Row]:
    """Log-probabilities of both sides of at most P pairs, the largest number that a sequence has."""
    batches = loader.batches(size)
    width = max(num_pairs(batch.part(row, row + 1)) for batch in batches for row in range(len(batch.inputs)))
    return {"log_probs": ((max(width, 1), 2), np.dtype(np.float32))}


def _fingerprint(model: nn.Module) -> str:
    """Sixteen hex digits that depend on all weights and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{list(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
