"""Build the model that a section describes, without values for its weights."""

from __future__ import annotations

from pretune.model.section import AnyModelConfig
from pretune.model.transformer import Transformer
from pretune.model.transformers_model.config import TransformersConfig
from pretune.model.transformers_model.model import TransformersModel

Model = Transformer | TransformersModel
"""A model as a run trains it: forward, unembed, head_weight, new_cache, reset_parameters, layers, embedded."""


def new_model(config: AnyModelConfig) -> Model:
    """The model of that section. Call `reset_parameters` or load weights after building it."""
    return TransformersModel(config) if isinstance(config, TransformersConfig) else Transformer(config)
