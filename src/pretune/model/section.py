"""The section `model`: our transformer, or a model that transformers builds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Tag

from pretune.core.config import validate
from pretune.model.config import ModelConfig
from pretune.model.transformers_model.config import TransformersConfig

AnyModelConfig = ModelConfig | TransformersConfig


def _tag(value: Any) -> Any:
    """What tells the two apart: our transformer has no `kind`."""
    if isinstance(value, Mapping):
        return value.get("kind", ModelConfig.tag)
    return getattr(value, "tag", None)


ModelSection = Annotated[
    Annotated[ModelConfig, Tag("own")] | Annotated[TransformersConfig, Tag("transformers")], Discriminator(_tag)
]


def model_of(section: Mapping[str, Any]) -> AnyModelConfig:
    """A section as it stands in YAML, typed; ConfigError for one that is none."""
    return validate(TransformersConfig if _tag(section) == TransformersConfig.tag else ModelConfig, section)
