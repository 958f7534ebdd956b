"""The folder of a model that transformers computes: read, and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from pretune.core.config import ConfigError, InputError, validate
from pretune.core.quiet import no_progress_bar, quiet
from pretune.model.huggingface.config_json import read_json
from pretune.model.huggingface.folder import weight_files
from pretune.model.transformers_model.config import TransformersConfig, library_config, section_of
from pretune.model.transformers_model.model import TransformersModel


def read_section(folder: Path) -> TransformersConfig:
    """The model section of a folder's config.json, as transformers reads it; InputError where transformers does not
    build it, or only with code that comes with the model."""
    path = folder / "config.json"
    content = read_json(path)
    try:
        return validate(TransformersConfig, section_of(content))
    except (ConfigError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None


def load_folder(folder: Path, model: TransformersModel) -> None:
    """Load the weights of a folder into `model`, in float32, as transformers does, which fuses some tensors.

    Raises InputError, naming a tensor, where one is missing, has another shape or has no place in the model.
    """
    from transformers import AutoModelForCausalLM

    weight_files(folder)  # refuses pickles, and shards that are missing
    config, about = library_config(model.section.whole), {"output_loading_info": True, "local_files_only": True}
    try:
        with quiet(), no_progress_bar():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=torch.float32, use_safetensors=True, ignore_mismatched_sizes=True, **about
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder}: transformers cannot load it: {' '.join(str(error).split())}") from None
    inner, said = loaded
    for kind, words in _FAULTS.items():
        if found := sorted(map(str, said.get(kind) or ())):
            raise InputError(
                f"{folder}: {len(found)} weights {words}, such as {found[0]}; its config.json and its weights do not "
                "belong together"
            )
    model.adopt(inner)


_FAULTS = {
    "missing_keys": "of the model are not there",
    "mismatched_keys": "have another shape than config.json says",
    "unexpected_keys": "have no place in the model",
}


def save_folder(model: TransformersModel, folder: Path, eos_id: int, dtype: str) -> None:
    """Write config.json and the weights, stored as `dtype`, under the names that transformers publishes them by.

    Raises ConfigError if a weight has a value outside the range of `dtype`. The model's weights are rounded to it.
    """
    from transformers import GenerationConfig

    inner: Any = model.inner
    finite = {name: bool(one.isfinite().all()) for name, one in inner.named_parameters()}
    inner.to(getattr(torch, dtype))
    lost = [name for name, one in inner.named_parameters() if finite[name] and not one.isfinite().all()]
    if lost:
        raise ConfigError(f"{lost[0]} has values too large for export.dtype={dtype}; use bfloat16 or float32")
    inner.config.bos_token_id, inner.config.eos_token_id, inner.config.pad_token_id = None, eos_id, None
    inner.config.dtype = getattr(torch, dtype)
    inner.generation_config = GenerationConfig()
    with quiet(), no_progress_bar():
        inner.save_pretrained(folder)


def linear_layers(model: TransformersModel) -> dict[str, list[tuple[str, int]]]:
    """The linear layers of the blocks by our names: the name of each in transformers, with its rows."""
    return {
        name: [(name.removeprefix("inner."), module.out_features)]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
