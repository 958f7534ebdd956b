"""What cannot be had of a model that transformers computes, settled before anything is built for it."""

from __future__ import annotations

from typing import Any

from pretune.core.config import ConfigError
from pretune.model.costs import skeleton
from pretune.model.transformers_model.config import TransformersConfig
from pretune.model.transformers_model.model import UNPACKED, TransformersModel
from pretune.quantization.config import QloraConfig
from pretune.run.config import RunConfig


def without_what_it_lacks(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The configuration without what its model cannot do, and a note for each change; nothing for our transformer.

    Raises ConfigError for 4-bit weights of a recurrent model, which reads weights without their layers.
    """
    section = config.model
    if not isinstance(section, TransformersConfig):
        return config, []
    model, notes = skeleton(section), list[str]()
    assert isinstance(model, TransformersModel)
    name = f"transformers' {section.model_type}"
    if isinstance(config.quantization, QloraConfig) and model.recurrent:
        raise ConfigError(
            f"quantization={config.quantization.kind}: {name} reads weights without their layers, so that they cannot "
            "be stored in 4 bits; use quantization=none"
        )
    parts = (config.data, *config.data.mix.values())
    if any(part.packing.isolate for part in parts) and not model.isolates:
        notes.append(f"{name} has no mask that keeps documents apart: {UNPACKED}")
    if config.precision.compile and not model.isolates:
        config = config.model_copy(update={"precision": config.precision.model_copy(update={"compile": False})})
        notes.append(f"not compiled: {name} does not run as one graph")
    if getattr(section.library, "router_aux_loss_coef", None):
        notes.append(f"{name} is trained without its auxiliary loss for balanced experts")
    return _decoding_uncompiled(config), notes if config.task == "train" else []


def _decoding_uncompiled(config: RunConfig) -> RunConfig:
    answers = config.evaluation.answers.model_copy(update={"compile": False})
    changes: dict[str, Any] = {
        "generate": config.generate.model_copy(update={"compile": False}),
        "evaluation": config.evaluation.model_copy(update={"answers": answers}),
    }
    return config.model_copy(update=changes)
