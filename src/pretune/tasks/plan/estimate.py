"""Estimate a run's memory, speed, steps and loss from its configuration alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from pretune.compute import hardware
from pretune.compute.config import OPTIONS
from pretune.compute.device import pick_device
from pretune.compute.devices import Device, named
from pretune.memory.estimate import Footprint
from pretune.model.config import ModelConfig
from pretune.model.costs import cache_bytes_per_token, parameters_by_part, skeleton, training_flops
from pretune.model.counts import count_parameters
from pretune.optim.trace import read_trace
from pretune.run.config import RunConfig
from pretune.run.folder import find_trace
from pretune.run.model import adapted_model
from pretune.run.teacher import teacher_flops
from pretune.tasks.plan.family import Biggest, search
from pretune.tasks.plan.loss import fitted_loss
from pretune.tasks.plan.scaling import Scaling, make_scaling


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes, times in seconds. Everything but the parameters is an estimate."""

    name: str
    device: Device
    precision: str
    """bf16, fp32..."""
    mfu: float
    parameters: dict[str, int]
    flops_per_token: float
    memory: dict[str, int]
    """By part, with micro-batches of `micro_batch` sequences."""
    usable_memory: int
    micro_batch: int
    largest_micro_batch: int | None
    """The largest that divides the sequences of a step and fits; None if not even one does."""
    cache_bytes_per_token: int
    tokens_per_second: float
    tokens: int
    steps: int
    seconds: float
    limit: str
    """The part of the budget that ends the run."""
    tokens_per_parameter: float
    compute_optimal_ratio: float
    fitted_loss: float | None
    """In nats per token; None for fine-tuning, and for too few tokens for the fit to hold."""
    biggest: list[Biggest]
    scaling: Scaling | None
    """Over plan.devices, which all figures of time and tokens are for; None for one."""
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON-serializable values, with full model sections."""
        plain = {**self.__dict__, "device": asdict(self.device), "scaling": self.scaling and asdict(self.scaling)}
        plain["biggest"] = [
            {**one.__dict__, "model": one.model and one.model.model_dump(mode="json")} for one in self.biggest
        ]
        return plain


def make_plan(config: RunConfig) -> Plan:
    """The plan of a run on the device that plan.device names, or on this machine's."""
    device, kind = planned_device(config)
    parameters, footprint = parameters_by_part(skeleton(config.model)), Footprint(config, kind)
    model = adapted_model(config, torch.device("meta"))
    if config.adapter.freezes:
        parameters["adapter, trained alone"] = count_parameters(model).trainable
    count, flops = sum(parameters.values()), training_flops(model, config.data.sequence_length) + teacher_flops(config)
    speed = config.plan.mfu * device.peak_flops / flops
    scaling = make_scaling(config, footprint, speed, hardware.usable(device.memory, kind))
    speed = speed if scaling is None else scaling.planned.tokens_per_second
    tokens, limit = _tokens(config, speed)
    rows, memory = config.batch.tokens // config.data.sequence_length, hardware.usable(device.memory, kind)
    largest = footprint.largest(memory, rows)
    micro_batch = (largest or 1) if config.batch.micro_batch == "auto" else config.batch.micro_batch
    parts = footprint.parts(micro_batch)
    if scaling is not None:
        micro_batch, parts = scaling.planned.micro_batch, scaling.memory
    seconds = config.budget.time or tokens / speed
    # The family of a model that transformers builds is not known.
    family = isinstance(config.model, ModelConfig)
    fresh = config.stage.init_from is None
    fitted = fitted_loss(count, tokens, config.model.vocab_size) if fresh else None
    return Plan(
        name=config.name,
        device=device,
        precision=OPTIONS[config.precision.compute],
        mfu=config.plan.mfu,
        parameters=parameters,
        flops_per_token=flops,
        memory=parts,
        usable_memory=memory,
        micro_batch=micro_batch,
        largest_micro_batch=largest,
        cache_bytes_per_token=cache_bytes_per_token(config.model, 2),
        tokens_per_second=speed,
        tokens=tokens,
        steps=tokens // config.batch.tokens,
        seconds=tokens / speed,
        limit=limit,
        tokens_per_parameter=tokens / count,
        compute_optimal_ratio=config.plan.tokens_per_parameter,
        fitted_loss=fitted,
        biggest=search(config, device, kind, seconds) if family and scaling is None else [],
        scaling=scaling,
        notes=_notes(config, device, kind, largest, micro_batch),
    )


def planned_device(config: RunConfig) -> tuple[Device, str]:
    """The device to plan for, and its kind: cuda, mps or cpu."""
    if config.plan.device is not None:
        return named(config.plan.device), "cuda"
    here = pick_device(config.device)
    return hardware.local_device(here, {"float32", "bfloat16", config.precision.activations}), here.type


def _tokens(config: RunConfig, speed: float) -> tuple[int, str]:
    """The number of tokens, in whole steps, until the first limit of the budget, and the name of that limit."""
    budget, step = config.budget, config.batch.tokens
    if budget.replay is not None:
        replayed = read_trace(find_trace(budget.replay, config.output_dir))
        return sum(one.tokens for one in replayed), "replay"
    steps: dict[str, int] = {}
    if budget.steps is not None:
        steps["steps"] = budget.steps
    if budget.tokens is not None:
        steps["tokens"] = -(-budget.tokens // step)
    if budget.time is not None:
        steps["time"] = max(round(budget.time * speed / step), 1)
    limit = min(steps, key=lambda name: steps[name])
    return steps[limit] * step, limit


def _notes(config: RunConfig, device: Device, kind: str, largest: int | None, micro_batch: int) -> list[str]:
    notes = []
    if kind == "cpu":
        eager = config.precision.activation_checkpointing and not config.precision.compile
        notes.append(
            "the memory is that of tensors; the C library keeps pieces of what a step frees, so that processes were "
            f"measured to take up to {3 if eager else 1.9} times as much, and their libraries come on top"
        )
    if largest is None:
        notes.append(f"not even one sequence of {config.data.sequence_length} tokens fits into {device.name}")
    elif micro_batch > largest:
        notes.append(f"batch.micro_batch={micro_batch} does not fit into {device.name}; set {largest}, or auto")
    if config.batch.warmup is not None:
        notes.append("steps are counted as if each read batch.tokens; with batch.warmup, early steps are smaller")
    if config.precision.activations == "bfloat16" and not device.has_bfloat16:
        notes.append(f"{device.name} has no bfloat16 arithmetic; its peak is that of float16: use precision=fp16")
    if config.precision.compute == "float8" and not device.has_float8:
        notes.append(f"{device.name} has no 8-bit matrix products: training will be refused; use precision=auto")
    elif config.precision.compute == "float8":
        notes.append("the peak is for 16-bit products; the speedup from 8-bit products has to be measured")
    if config.precision.activation_checkpointing:
        notes.append("plan.mfu does not account for recomputed (checkpointed) activations: expect a quarter less speed")
    if config.precision.compute == "float32" and config.plan.device is not None:
        notes.append(f"{device.name} is planned with its 16-bit peak; precision=fp32 is several times slower")
    return notes
