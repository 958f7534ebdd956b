"""The adapter that adapter.init_from names: of a run, or in a folder that peft wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pretune.checkpoint import store as checkpoint
from pretune.core.config import InputError
from pretune.core.files import ADAPTER_CONFIG
from pretune.run.config import RunConfig
from pretune.run.folder import find_run
from pretune.run.weights import chosen_checkpoint

if TYPE_CHECKING:
    from pretune.adapters.from_huggingface import TheirAdapter
    from pretune.model.build import Model


def given_folder(config: RunConfig) -> Path | None:
    """The folder with the adapter that the run starts from, if any; InputError if there is none, or it is damaged."""
    if config.adapter.kind == "none" or config.adapter.init_from is None:
        return None
    folder = Path(config.adapter.init_from)
    if not (folder / ADAPTER_CONFIG).is_file():
        try:
            folder = chosen_checkpoint(find_run(config.adapter.init_from, config.output_dir))
        except InputError as error:
            neither = f"{folder} is no run, and holds no adapter: it has no {ADAPTER_CONFIG}"
            raise InputError(f"adapter.init_from: {neither if folder.is_dir() else error}") from None
    if (folder / checkpoint.STATE).is_file():
        checkpoint.check(folder)
    return folder


def given_of_others(config: RunConfig, model: Model) -> TheirAdapter | None:
    """The adapter that the run starts from if it is one of the model of transformers, and not of `model`, which must
    be plain.

    Raises InputError if there is none, or it cannot be ours; ConfigError where the adapter section has other settings.
    """
    folder, section = given_folder(config), config.adapter
    if folder is None or section.kind == "none":
        return None
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from pretune.adapters.from_huggingface import has_our_names, their_adapter
    from pretune.model.adapter_names import names_in_transformers

    # Its values are needed for a plan, too: they say what its layers share.
    with torch.device("cpu"), unset_fake_temporarily():
        if has_our_names(folder, model):
            return None
        found = their_adapter(folder, names_in_transformers(config.model, "embedding" in section.targets))
    found.check(section, model)
    return found


def notes_on_adapter(config: RunConfig, base: str) -> Iterator[str]:
    """What is worth knowing of the adapter that the run starts from, on the weights called `base`."""
    import torch

    from pretune.model.build import new_model

    with torch.device("meta"):
        found = given_of_others(config, new_model(config.model))
    return iter(()) if found is None else iter(found.notes(base))
