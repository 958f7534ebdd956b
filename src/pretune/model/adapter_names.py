"""The names that the linear layers of a model have in transformers, where adapters of others are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pretune.model.costs import skeleton
from pretune.model.huggingface.fitting import family_of
from pretune.model.huggingface.folding import adapter_layers, portable_config
from pretune.model.section import AnyModelConfig
from pretune.model.transformers_model.config import TransformersConfig
from pretune.model.transformers_model.folder import linear_layers
from pretune.model.transformers_model.model import TransformersModel


def names_in_transformers(config: AnyModelConfig, on_embedding: bool) -> Mapping[str, Sequence[tuple[str, int]]]:
    """For each of our linear layers, by name: the layers of transformers that it stacks, with their rows, in order.

    Raises ConfigError for a model without a counterpart in transformers, see `adapter_layers`.
    """
    if isinstance(config, TransformersConfig):
        model = skeleton(config)
        assert isinstance(model, TransformersModel)
        return linear_layers(model)
    return adapter_layers(config, on_embedding)


def stored_transposed(config: AnyModelConfig) -> bool:
    """Whether transformers stores the matrices of the linear layers transposed."""
    return not isinstance(config, TransformersConfig) and family_of(portable_config(config)).transposed
