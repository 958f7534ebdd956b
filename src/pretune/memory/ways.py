"""The memory of a model by what is done with it: all of it trained, an adapter, an adapter on 4 bits, generation.

Training uses micro-batches of one sequence without compilation, which needs the least memory, and the run's optimizer,
precision, batch and setting for activation checkpointing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pretune.adapters.config import AdapterConfig, NoAdapterConfig
from pretune.core.config import ConfigError
from pretune.memory.estimate import Footprint
from pretune.model.config import ModelConfig
from pretune.model.costs import inference_bytes, parameters_by_part, skeleton
from pretune.model.section import AnyModelConfig
from pretune.quantization.config import NoQuantizationConfig, QuantizationConfig
from pretune.run.config import RunConfig

Way = Literal["full", "LoRA", "QLoRA", "generation"]
WAYS: tuple[Way, ...] = ("full", "LoRA", "QLoRA", "generation")


@dataclass(frozen=True)
class Methods:
    """The sections that LoRA and QLoRA are estimated with."""

    lora: AdapterConfig
    qlora: QuantizationConfig


def memory_by_way(
    config: RunConfig, model: AnyModelConfig, context: int, methods: Methods, kind: str
) -> dict[Way, int | None]:
    """Bytes that each way takes at its peak with `model` in place of the run's, for sequences of `context` tokens on a
    device of `kind` (as torch calls it); None for a way that the model cannot go: 4-bit groups that do not divide its
    matrices."""
    none, whole = NoAdapterConfig(kind="none"), NoQuantizationConfig(kind="none")
    parameters = sum(parameters_by_part(skeleton(model)).values())
    return {
        "full": _peak(config, model, context, none, whole, kind),
        "LoRA": _peak(config, model, context, methods.lora, whole, kind),
        "QLoRA": _peak(config, model, context, methods.lora, methods.qlora, kind),
        "generation": inference_bytes(model, parameters, context),
    }


def _peak(
    config: RunConfig,
    model: AnyModelConfig,
    context: int,
    adapter: AdapterConfig,
    quantization: QuantizationConfig,
    kind: str,
) -> int | None:
    changes: dict[str, Any] = {
        "name": f"{config.name}, estimated",  # the name of no run, whose own adapter would be taken
        "model": model,
        "data": config.data.model_copy(update={"sequence_length": context}),
        "precision": config.precision.model_copy(update={"compile": False}),
        "adapter": adapter,
        "quantization": quantization,
    }
    try:
        return max(_peaks(config.model_copy(update=changes), kind))
    except ConfigError:
        return None


def _peaks(config: RunConfig, kind: str) -> list[int]:
    """Bytes at the moments of which one is the peak. Of a deep model they are extrapolated from its shallow relatives:
    each further period of layers adds what the third added."""
    model = config.model
    if not isinstance(model, ModelConfig):
        return list(Footprint(config, kind).peaks(1))
    period = 2 if model.value_embeddings else len(model.window.pattern) if model.window else 1
    shallow = 2 * period
    if model.num_layers <= shallow + period:
        return list(Footprint(config, kind).peaks(1))
    few, more = (_with_layers(config, layers, kind) for layers in (shallow, shallow + period))
    rest = (model.num_layers - shallow) / period
    return [round(first + rest * (second - first)) for first, second in zip(few, more, strict=True)]


def _with_layers(config: RunConfig, num_layers: int, kind: str) -> tuple[int, ...]:
    shallow = config.model.model_copy(update={"num_layers": num_layers})
    return Footprint(config.model_copy(update={"model": shallow}), kind).peaks(1)
