"""The folder of a Hugging Face model: config.json, and safetensors in one file or several."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretune.core.config import InputError
from pretune.model.config import ModelConfig
from pretune.model.huggingface.config_json import read_config
from pretune.model.huggingface.fitting import family_of
from pretune.model.huggingface.weights import HEAD

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a folder by name, in their stored dtype, read (or mapped into memory) when they are looked up.

    A file of a model without its head leaves out the `prefix` of names; names here have it. Raises InputError for files
    that are missing, damaged or pickled.
    """

    def __init__(self, folder: Path, prefix: str = "model.") -> None:
        self._folder = folder
        self._places: dict[str, tuple[str, str]] = {}
        for file, names in weight_files(folder).items():
            try:
                with safe_open(folder / file, framework="pt") as opened:
                    stored = list(opened.keys())
            except (SafetensorError, OSError) as error:
                raise InputError(f"{folder / file} cannot be read ({error}); download it again") from None
            absent = [name for name in names or () if name not in stored]
            if absent:
                raise InputError(f"{folder / file} has no {absent[0]}, which {INDEX} says is in it; download it again")
            self._places |= {name: (file, name) for name in names or stored}
        if not any(name.startswith(prefix) for name in self._places):
            self._places = {name if name == HEAD else f"{prefix}{name}": at for name, at in self._places.items()}

    def __getitem__(self, name: str) -> Tensor:
        file, stored = self._places[name]
        # Opened each time: a file that stays open keeps in memory all that was ever read from it.
        with safe_open(self._folder / file, framework="pt") as opened:
            return opened.get_tensor(stored)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def rename(self, old: str, new: str) -> None:
        """Give a tensor another name."""
        self._places[new] = self._places.pop(old)


class Found(NamedTuple):
    """A model in a folder: `load_huggingface(tensors, model)` loads its weights."""

    config: ModelConfig
    tensors: StoredTensors


def open_folder(folder: Path) -> Found:
    """The model in a folder; its weights are not read yet.

    Where config.json says that the head is tied to the embedding and a head is stored as well, it is left out if the
    two are equal, and otherwise the model is untied: a trained head is never dropped (transformers 5 does the same).
    Raises InputError, in one line that names the file, for whatever cannot be read.
    """
    config = read_config(folder)
    embedding = f"{family_of(config).places[0]}.weight"
    tensors = StoredTensors(folder, f"{embedding.partition('.')[0]}.")
    if config.tied_embeddings and HEAD in tensors:
        if embedding not in tensors:
            tensors.rename(HEAD, embedding)
        elif not torch.equal(tensors[HEAD], tensors[embedding]):
            config = config.model_copy(update={"tied_embeddings": False})
    return Found(config, tensors)


def weight_files(folder: Path) -> dict[str, list[str] | None]:
    """The files with weights, and the names of the tensors to read from each; None for all."""
    if (folder / WEIGHTS).is_file():
        return {WEIGHTS: None}
    if not (folder / INDEX).is_file():
        pickled = sorted(one.name for end in ("*.bin", "*.pt", "*.pth") for one in folder.glob(end))
        if pickled:
            raise InputError(
                f"{folder} has its weights only in {pickled[0]}, a pickle, which may run code when it is read. Convert "
                f"it where you trust it: transformers.AutoModelForCausalLM.from_pretrained('{folder}')"
                ".save_pretrained('NEW_FOLDER')"
            )
        raise InputError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}")
    try:
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files: dict[str, list[str] | None] = {str(file): [] for file in places.values()}
    except (ValueError, OSError, LookupError, TypeError, AttributeError):
        raise InputError(f"{folder / INDEX} has no readable weight_map; download it again") from None
    for file in files:
        if Path(file).name != file or not (folder / file).is_file():
            raise InputError(f"{folder} lacks {file}, which {INDEX} names; download it again")
        files[file] = [name for name, place in places.items() if place == file]
    return files
