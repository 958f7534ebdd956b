"""Configuration of a model that transformers builds: the contents of its config.json."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import pydantic
from pydantic import Field

from pretune.core.config import Section

UNLIMITED = 2**20
"""Positions of a model that has no limit of its own, as recurrent ones have none."""

_STORED = frozenset({"auto_map", "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path"})
"""Keys that say how a model is stored, not what it computes."""


class TransformersConfig(Section):
    kind: Literal["transformers"]
    """A model that transformers builds and computes."""
    tag: ClassVar[str] = "transformers"
    vocab_size: Annotated[int, Field(ge=1, le=2**24)]
    """Number of token ids; at least as many as the tokenizer has."""
    config: dict[str, Any]
    """The contents of a config.json but for vocab_size: model_type, and whatever differs from what transformers takes
    for that type. A run that starts from a model of others takes its config.json, with these keys in place of its
    own."""
    architecture: ClassVar[None] = None

    @pydantic.model_validator(mode="after")
    def _transformers_builds_it(self) -> Self:
        if "vocab_size" in self.config:
            raise ValueError("config.vocab_size is set by the key vocab_size beside it: leave it out of config")
        library_config(self.whole)
        return self

    @property
    def whole(self) -> dict[str, Any]:
        """The contents of a config.json."""
        return {**self.config, "vocab_size": self.vocab_size}

    @property
    def library(self) -> Any:
        """transformers' configuration of the language model; not to be changed."""
        return _cached(json.dumps(self.whole)).get_text_config(decoder=True)

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    @property
    def max_sequence_length(self) -> int:
        """Number of positions."""
        names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
        found = (getattr(self.library, name, None) for name in names)
        return next((one for one in found if isinstance(one, int) and one > 0), UNLIMITED)

    @property
    def dim(self) -> int:
        """Width of the residual stream."""
        return int(self.library.hidden_size)

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the feed-forward network; four times `dim` where transformers has no name for it."""
        names = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
        found = (getattr(self.library, name, None) for name in names)
        return next((one for one in found if isinstance(one, int)), 4 * self.dim)

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return int(self.library.num_hidden_layers)

    @property
    def tied_embeddings(self) -> bool:
        """Whether the embedding table is the output head too."""
        return bool(getattr(self.library, "tie_word_embeddings", False))

    @property
    def dropout(self) -> float:
        """The largest probability of any dropout."""
        named = ((key, value) for key, value in self.library.to_dict().items() if "drop" in key)
        return max((float(value) for key, value in named if type(value) in (int, float)), default=0.0)

    @property
    def num_heads(self) -> int:
        """Number of query heads; 0 for a model without attention."""
        found = getattr(self.library, "num_attention_heads", None)
        return found if isinstance(found, int) else 0

    @property
    def head_dim(self) -> int:
        """Width of one head; 0 for a model without attention."""
        found = getattr(self.library, "head_dim", None)
        return found if isinstance(found, int) else self.dim // self.num_heads if self.num_heads else 0

    @property
    def num_kv_heads(self) -> int:
        """Number of key and value heads."""
        found = getattr(self.library, "num_key_value_heads", None)
        return found if isinstance(found, int) else self.num_heads


def section_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The section of a model from the contents of its config.json, without keys that only say how it is stored.

    Raises ValueError where `library_config` does.
    """
    library = library_config(content)
    kept = {key: value for key, value in content.items() if key not in _STORED | {"vocab_size"}}
    return {"kind": "transformers", "vocab_size": library.get_text_config(decoder=True).vocab_size, "config": kept}


def library_config(content: Mapping[str, Any]) -> Any:
    """transformers' own configuration from the contents of a config.json, which is new each time.

    Raises ValueError, in one line, for an architecture that transformers does not build as a language model, for one
    that needs code from elsewhere, which is never run, and for values that it does not take.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = content.get("model_type")
    if name is None:
        raise ValueError(
            "config has no model_type: give the contents of a config.json (model_type: mixtral, hidden_size: ...), or "
            "set stage.init_from to a model"
        )
    if name not in CONFIG_MAPPING:
        remote = content.get("auto_map")
        code = f"; it needs code that comes with the model ({_first(remote)}), which is never run" if remote else ""
        raise ValueError(f"model_type = {name!r} is no architecture that transformers builds{code}")
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"model_type = {name!r} is no language model in transformers (AutoModelForCausalLM)")
    if content.get("quantization_config"):
        raise ValueError("config has quantization_config: use the model's unquantized weights")
    try:
        return CONFIG_MAPPING[name].from_dict({key: value for key, value in content.items() if key not in _STORED})
    except Exception as error:  # each architecture checks its values in its own way
        reason = " ".join(str(error).split())
        raise ValueError(f"transformers does not take this config of model_type = {name!r}: {reason}") from None


@functools.lru_cache(maxsize=16)
def _cached(content: str) -> Any:
    return library_config(json.loads(content))


def _first(auto_map: Any) -> str:
    def named(value: Any) -> Iterator[str]:
        for one in value.values() if isinstance(value, Mapping) else [value]:
            yield str(one[0] if isinstance(one, list) and one else one)

    return next(named(auto_map), "auto_map")
