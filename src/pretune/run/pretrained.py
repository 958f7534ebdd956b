"""A model of others: a folder in Hugging Face's format, or a model on the hub, downloaded into such a folder."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pretune.core.config import InputError
from pretune.core.files import fingerprint, measure

if TYPE_CHECKING:
    from pretune.model.build import Model
    from pretune.model.config import ModelConfig
    from pretune.model.section import AnyModelConfig
    from pretune.run.hub_models import Needed

_HUB_ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class PretrainedModel:
    """A model in Hugging Face's format, in a folder."""

    path: Path
    name: str
    """Its folder, or `owner/name@commit` on the hub."""
    whole: bool = True
    """Whether its weights are there, and not only its config.json."""

    @property
    def tokenizer(self) -> Path:
        """The folder with its tokenizer."""
        return self.path

    def config(self, kind: Literal["own", "transformers"] | None = None) -> AnyModelConfig:
        """Its model section, as one of our transformer or of transformers; None: of ours where that can hold it.

        Raises InputError if it cannot be read, or neither can be had.
        """
        from pretune.model.huggingface.keys import NotHeld
        from pretune.model.transformers_model.folder import read_section

        obstacle = ""
        if kind != "transformers":
            try:
                return self._own()
            except NotHeld as error:
                if kind == "own":
                    raise
                obstacle = str(error)
        try:
            return read_section(self.path)
        except InputError as error:
            raise InputError(f"{obstacle}; nor can transformers ({error})" if obstacle else str(error)) from None

    def obstacle(self) -> str | None:
        """Why our transformer cannot hold it, if transformers may; None if it can. InputError if it cannot be read."""
        from pretune.model.huggingface.keys import NotHeld

        try:
            self._own()
        except NotHeld as error:
            return str(error)
        return None

    def _own(self) -> ModelConfig:
        if self.whole:
            from pretune.model.huggingface.folder import open_folder

            return open_folder(self.path).config
        from pretune.model.huggingface.config_json import read_config

        return read_config(self.path)

    def identity(self) -> str:
        """Sixteen hex digits that depend on all its weights."""
        from pretune.model.huggingface.folder import weight_files

        return fingerprint({file: _measured(self.path / file) for file in weight_files(self.path)})

    def load(self, model: Model) -> None:
        """Load its weights; InputError if they do not fit `model`."""
        from pretune.model.huggingface.folder import open_folder
        from pretune.model.huggingface.weights import load_huggingface
        from pretune.model.transformers_model.folder import load_folder
        from pretune.model.transformers_model.model import TransformersModel

        if isinstance(model, TransformersModel):
            load_folder(self.path, model)
            return
        load_huggingface(open_folder(self.path).tensors, model)


def find_pretrained(name: str, needed: Needed = "weights") -> PretrainedModel | None:
    """The model in the folder `name`, or on the hub by that name (`owner/name` or `owner/name@revision`), downloaded
    if it is not in the cache of huggingface_hub; None if `name` is neither.

    Raises InputError, naming the cause, if the hub does not give it.
    """
    folder = Path(name)
    if (folder / "config.json").is_file():
        return PretrainedModel(folder, name, needed == "weights")
    if folder.exists():
        return None
    named = _HUB_ID.fullmatch(name)
    if named is None or Path(name).parent.is_dir():
        return None
    from pretune.run.hub_models import download_model

    path, commit = download_model(named["repository"], named["revision"], needed)
    return PretrainedModel(path, f"{named['repository']}@{commit}", needed == "weights")


def _measured(path: Path) -> dict[str, Any]:
    about = path.stat()
    return _measured_once(path, about.st_ino, about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _measured_once(path: Path, *_: int) -> dict[str, Any]:
    """Hashed once while it stays the same file: a start asks several times for what identifies a model."""
    return measure(path)


def why_no_model(name: str) -> str | None:
    """Why the folder `name` is neither a run nor a model; None if there is no such folder."""
    folder = Path(name)
    if (folder / "adapter_config.json").is_file():
        return f"{folder} holds an adapter: give it as adapter.init_from, and the model that it belongs on here"
    if folder.is_dir():
        return f"{folder} has neither config.yaml (a run) nor config.json (a model in Hugging Face's format)"
    return None
