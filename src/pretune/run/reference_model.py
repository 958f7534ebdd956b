"""The reference model of preference training: the model as it was at the start of the run.

It comes in three forms: a second, frozen model; the model in training with its adapter disabled; or its
log-probabilities of all pairs in the run's data, computed once and kept in the cache.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pretune.compute.precision import autocast
from pretune.core.config import InputError
from pretune.core.files import atomic_folder, fingerprint, measure, read_sealed, write_sealed
from pretune.core.progress_bar import PreparationBar
from pretune.core.terminal import warn
from pretune.data.loader import Loader
from pretune.data.packing import VERSION as PACKING_VERSION
from pretune.data.tokens import TokenData
from pretune.model.build import Model
from pretune.objectives.objective import objective_of
from pretune.objectives.preference import num_pairs, pair_log_probs
from pretune.run.config import RunConfig
from pretune.run.folder import cache_folder
from pretune.run.model import adapted_model, apply_precision, quantize
from pretune.run.parts import Parts, Reference

VERSION = 2
"""Increment when the same weights and pairs would give different log-probabilities, or other files: it is part of the
cache key."""

_TABLE, _RECORD = "log_probs.npy", "complete.json"


def with_reference(config: RunConfig, parts: Parts) -> Parts:
    """`parts` with the reference model that the run's objective needs; unchanged if it needs none.

    Call it after the model's adapter and quantization, if any, are in place.
    """
    if not config.stage.objective.needs_reference:
        return parts
    kind = config.reference
    if kind == "adapter_off":
        from pretune.adapters.attach import adapted_layers, switched_off

        if adapted_layers(parts.model):  # a finished run's adapter is merged, so a second model is needed
            off = _reference(config, parts.model, lambda: switched_off(parts.model))
            return dataclasses.replace(parts, reference=off)
    # Include the adapter: one that starts with an update (PiSSA, or init_from) is part of the initial model.
    start = adapted_model(config, parts.device)
    weights = _fingerprint(start) if kind == "cached" else ""
    quantize(config.quantization, start)
    apply_precision(config.precision, start)
    reference, data = _reference(config, start.eval().requires_grad_(False), nullcontext), parts.data
    if kind != "cached":
        return dataclasses.replace(parts, reference=reference)
    train, validation = (
        _with_table(config, parts.device, reference, weights, side) for side in (data.train, data.validation)
    )
    return dataclasses.replace(parts, data=dataclasses.replace(data, train=train, validation=validation))


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


def _reference(config: RunConfig, model: Model, mode: Callable[[], AbstractContextManager[None]]) -> Reference:
    chunk_tokens = config.stage.objective.chunk_tokens
    return Reference(lambda batch: pair_log_probs(model, batch, chunk_tokens), mode)


def _with_table(
    config: RunConfig, device: torch.device, reference: Reference, weights: str, data: TokenData
) -> TokenData:
    """`data` with the reference's log-probabilities of its pairs, from the cache, or computed and stored there."""
    depends_on = {
        "version": [VERSION, PACKING_VERSION],
        "weights": weights,
        "model": config.model.model_dump(),
        "arithmetic": [config.precision.compute, config.quantization.model_dump()],
        "data": [data.folder.name, data.side],
        "sequences": [config.data.sequence_length, config.data.packing.model_dump()],
    }
    folder = cache_folder() / f"reference-{fingerprint(depends_on)}"
    if not _is_whole(folder):
        table = _log_probs(config, device, reference, data)
        try:
            if folder.exists():
                warn(f"the reference's log-probabilities in {folder} were damaged: computed again")
                shutil.rmtree(folder)
            with atomic_folder(folder) as temporary:
                np.save(temporary / _TABLE, table)
                write_sealed(temporary / _RECORD, measure(temporary / _TABLE))
        except OSError as error:
            raise InputError(f"cannot write the reference's log-probabilities to {folder}: {error.strerror}") from None
    found = copy.copy(data)
    found.reference_log_probs = np.load(folder / _TABLE, mmap_mode="r")
    return found


def _is_whole(folder: Path) -> bool:
    """Whether a table is there, and its content is what was written."""
    try:
        return read_sealed(folder / _RECORD) == measure(folder / _TABLE)
    except (OSError, ValueError):
        return False


def _log_probs(config: RunConfig, device: torch.device, reference: Reference, data: TokenData) -> np.ndarray:
    """The reference's log-probabilities of both sides of all pairs: [num_sequences, P, 2], at most P pairs per
    sequence."""
    loader, parts, width = Loader(data, config.data, config.seed), [], 1
    with PreparationBar(f"log-probabilities of the reference, {data.side}") as bar, torch.no_grad():
        for batch in loader.batches(config.evaluation.micro_batch):
            with autocast(config.precision, device):
                parts.append(reference.log_probs(batch.to(device)).cpu().numpy())
            width = max(width, *(num_pairs(batch.part(row, row + 1)) for row in range(len(batch.inputs))))
            bar.advance(len(parts) * len(batch.inputs), batch.inputs.numel())
    return np.concatenate(parts)[: loader.num_sequences, :width]


def _fingerprint(model: nn.Module) -> str:
    """Sixteen hex digits that depend on all weights and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{list(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
