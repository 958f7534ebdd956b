"""The teacher of a distillation: a frozen model of a shape of its own, with the tokenizer of the run."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch

from pretune.compute.precision import dtype_of
from pretune.core.config import ConfigError, InputError
from pretune.data.loader import Loader
from pretune.model.costs import forward_flops, skeleton
from pretune.model.section import AnyModelConfig, model_of
from pretune.objectives.config import DistillationConfig
from pretune.run.config import RunConfig
from pretune.run.frozen_tables import Row, Tables, with_tables
from pretune.run.model import without_values
from pretune.run.parts import Frozen, Parts
from pretune.run.pretrained import PretrainedModel
from pretune.run.teacher_start import TEACHER, find_teacher
from pretune.run.tokenizer import check_ids_of_teacher
from pretune.run.weights import Start, load_start, model_section, start_identity_of


def teacher_identity(config: RunConfig) -> str | None:
    """What identifies the teacher's weights; None if the run has no teacher."""
    teacher = find_teacher(config)
    return None if teacher is None else start_identity_of(teacher)


def teacher_shape(config: RunConfig) -> AnyModelConfig | None:
    """The teacher's model section, for which its configuration is enough; None if the run has no teacher."""
    teacher = find_teacher(config, config_only=True)
    return None if teacher is None else _shape_of(teacher)


def teacher_flops(config: RunConfig) -> float:
    """Operations of the teacher per token of a training step; 0 if the run has none, or has its outputs stored."""
    section, shape = config.stage.objective, teacher_shape(config)
    if shape is None or (isinstance(section, DistillationConfig) and section.cached):
        return 0.0
    return forward_flops(skeleton(shape), config.data.sequence_length)


def teacher_dtype(config: RunConfig) -> torch.dtype:
    """The type that the teacher's weights are kept and multiplied in."""
    section = config.stage.objective
    assert isinstance(section, DistillationConfig), "it has no teacher"
    return dtype_of(config.precision.activations if section.teacher_dtype == "auto" else section.teacher_dtype)


def with_teacher(config: RunConfig, parts: Parts, validation_only: bool) -> Parts:
    """`parts` with the teacher of a distillation, or with what it says of the data.

    Raises ConfigError for a teacher with another tokenizer, too few positions or too few tokens.
    """
    section, start = config.stage.objective, find_teacher(config)
    assert isinstance(section, DistillationConfig), "it has no teacher"
    assert start is not None, "it has a teacher"
    shape = _shape_of(start)
    _check(config, parts, start, shape)
    frozen = functools.cache(lambda: _frozen(config, start, shape, parts.device))
    if not section.cached:
        return dataclasses.replace(parts, frozen=frozen())
    kept, size = section.top_k, min(config.model.vocab_size, shape.vocab_size)
    assert kept is not None, "RunConfig ensures it"
    token = np.dtype(np.uint16 if size <= 2**16 else np.int32)

    def rows(loader: Loader) -> dict[str, Row]:
        return {
            "log_probs": ((loader.length, kept + 1), np.dtype(np.float16)),
            "tokens": ((loader.length, kept), token),
        }

    tables = Tables(
        title="the teacher's outputs",
        depends_on={
            "weights": start_identity_of(start),
            "model": shape.model_dump(),
            "arithmetic": str(teacher_dtype(config)),
            "kept": [kept, section.temperature, size],
        },
        rows=rows,
        frozen=frozen,
        smaller="lower stage.objective.top_k, set stage.objective.cached=false",
    )
    return with_tables(config, parts, tables, validation_only)


def _frozen(config: RunConfig, start: Start, shape: AnyModelConfig, device: torch.device) -> Frozen:
    model, dtype = without_values(shape), teacher_dtype(config)
    load_start(model, start)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)
    # Only its weights change their type: the tables of rotary positions need all of their digits.
    model.to(device).eval().requires_grad_(False)
    if dtype == torch.float32:
        return Frozen(model, lambda: torch.autocast(device.type, enabled=False))
    return Frozen(model, lambda: torch.autocast(device.type, dtype=dtype))


def _shape_of(teacher: Start) -> AnyModelConfig:
    if isinstance(teacher, PretrainedModel):
        return teacher.config()
    section = model_section(teacher)
    try:
        return model_of(section)
    except ConfigError as error:
        fault = str(error).splitlines()[0]
        raise InputError(f"{TEACHER}: the model in {teacher.config} cannot be read: {fault}") from None


def _check(config: RunConfig, parts: Parts, start: Start, shape: AnyModelConfig) -> None:
    section, length = config.stage.objective, config.data.sequence_length
    assert isinstance(section, DistillationConfig), "it has no teacher"
    check_ids_of_teacher(parts.tokenizer, start, config.data)
    if parts.tokenizer.vocab_size > shape.vocab_size:
        raise ConfigError(
            f"{TEACHER}: {start.name} has a vocabulary of {shape.vocab_size:,} tokens, and the run's tokenizer "
            f"{parts.tokenizer.vocab_size:,}; take a teacher that was trained with this tokenizer"
        )
    if length > shape.max_sequence_length:
        raise ConfigError(
            f"data.sequence_length ({length}) exceeds the {shape.max_sequence_length} positions of {start.name}, the "
            "teacher; lower it, or take another teacher"
        )
    if section.top_k is not None and section.top_k >= min(config.model.vocab_size, shape.vocab_size):
        raise ConfigError(
            f"stage.objective.top_k ({section.top_k}) is not less than the number of tokens; set it to null, which "
            "compares them all"
        )
