"""Download a model from the Hugging Face hub into its own cache, resumably and with its progress bars."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, Literal

from pretune.core.config import InputError
from pretune.core.terminal import warn
from pretune.data.sources.hub import Unreachable, check_reachable, error_summary, quiet_libraries

PICKLED = (".bin", ".pt", ".pth", ".pkl")
MODEL_FILES: tuple[str, ...] = (
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
    "model.safetensors",
    "model-*.safetensors",
)
"""What is downloaded of a model: neither pickles nor weights in other libraries' formats."""
ABOUT_FILES: tuple[str, ...] = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "*.jinja",
    "README.md",
    "LICENSE*",
)
"""What tells about a model without its weights and its vocabulary."""
Needed = Literal["weights", "config", "about"]
"""What is needed of a model: all of it, its config.json, or what tells about it without its weights."""
WANTED: dict[Needed, tuple[str, ...]] = {"weights": MODEL_FILES, "config": ("config.json",), "about": ABOUT_FILES}
"""The files to download, by what is needed of a model."""


def download_model(repository: str, revision: str | None, needed: Needed = "weights") -> tuple[Path, str]:
    """The folder with the files of a model, downloaded or from the Hugging Face cache, and the commit they are of.

    What is in the cache whole is taken from there if `revision` is a commit or the hub cannot be reached. Raises
    InputError if the hub does not give the model, or if it has none in safetensors.
    """
    from huggingface_hub import snapshot_download

    cached = _cached_model(repository, revision, needed)
    if cached is not None and revision == cached.name:
        return cached, cached.name
    try:
        found = check_reachable(repository, revision, "model")
    except Unreachable as error:
        if cached is None:
            raise
        warn(f"note: {error}; taking {repository} as it is in the Hugging Face cache, {cached.name[:7]}")
        found = None
    if found is None:
        if cached is None:
            raise InputError(
                f"HF_HUB_OFFLINE is set, and the Hugging Face cache has no {repository}"
                f"{f' at {revision}' if revision else ''}, or not all of it; download it where there is a network"
            )
        return cached, cached.name
    _check_files(repository, [one.rfilename for one in found.siblings or []], needed)
    try:
        # By the name of the revision, so that the cache knows later which commit that is.
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(WANTED[needed])))
        return folder, folder.name
    except OSError as error:
        if error.errno is not None and error.strerror is not None:
            raise  # the disk's
        raise _failed(repository, error) from error
    except Exception as error:
        raise _failed(repository, error) from error


def stored_tensors(folder: Path, repository: str | None, commit: str | None) -> Any:
    """What the headers of a model's safetensors say (huggingface_hub's SafetensorsRepoMetadata): those in `folder`, or
    else of a repository on the hub, of which nothing but the headers is read. None where there are none to read."""
    from huggingface_hub import get_local_safetensors_metadata, get_safetensors_metadata
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError

    wrong = NotASafetensorsRepoError, SafetensorsParsingError, HfHubHTTPError, OSError, ValueError, LookupError
    with contextlib.suppress(*wrong):
        return get_local_safetensors_metadata(folder)
    if repository is None:
        return None
    with quiet_libraries(), contextlib.suppress(*wrong):
        return get_safetensors_metadata(repository, revision=commit)
    return None


def _check_files(repository: str, files: list[str], needed: Needed) -> None:
    """Raise InputError if a repository with these files has no model that can be read."""
    if "config.json" not in files:
        raise InputError(f"'{repository}' has no config.json: it is not a model in Hugging Face's format")
    pickled = sorted(file for file in files if Path(file).suffix in PICKLED)
    if pickled and needed != "config" and not any(file.endswith(".safetensors") for file in files):
        raise InputError(
            f"'{repository}' has its weights only in {pickled[0]}, a pickle, which may run code when it is read. "
            f"Convert it where you trust it: transformers.AutoModelForCausalLM.from_pretrained('{repository}')"
            ".save_pretrained('FOLDER'), and give FOLDER"
        )


def _failed(repository: str, error: Exception) -> InputError:
    return InputError(
        f"the download of '{repository}' from the hub failed: {error_summary(error)}; run the same command again to go "
        "on with it"
    )


def _cached_model(repository: str, revision: str | None, needed: Needed) -> Path | None:
    """The folder of a model in the Hugging Face cache, if what is needed of it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        wanted = list(WANTED[needed])
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=wanted, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    if not (folder / "config.json").is_file():
        return None
    # Whatever wrote the cache: not every version of the library says whether it is whole.
    whole = (folder / "model.safetensors").is_file()
    with contextlib.suppress(OSError, ValueError, LookupError, AttributeError):
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        whole = all((folder / file).is_file() for file in index["weight_map"].values())
    return folder if whole or needed != "weights" else None
