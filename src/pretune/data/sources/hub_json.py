"""Rows of JSON files in a hub dataset, by the same reader as local files."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from pretune.core.config import InputError
from pretune.data.sources.config import HubSource
from pretune.data.sources.data_file import DataFile
from pretune.data.sources.json_values import records


def json_rows(config: HubSource) -> Iterator[dict[str, Any]] | None:
    """The rows of the split, or None if the dataset is not in JSON files.

    `datasets` finds the files of each split, and what a split such as `train[:1%]` means. Raises InputError for a split
    that does not exist.
    """
    files = _files_by_split(config)
    if files is None:
        return None
    if config.split in files:
        return _read(files[config.split])
    return _part(config, files)


def _read(files: list[DataFile]) -> Iterator[dict[str, Any]]:
    return itertools.chain.from_iterable(records(file) for file in files)


def _part(config: HubSource, files: dict[str, list[DataFile]]) -> Iterator[dict[str, Any]]:
    """The rows of a split with slices, such as `train[:100]+validation`; the whole splits are counted first."""
    from datasets import ReadInstruction

    unknown = InputError(
        f"hub dataset '{config.path}' has no split '{config.split}' (it has: {', '.join(files)}); set data.source.split"
    )
    try:
        wanted = ReadInstruction.from_spec(config.split)
    except Exception:  # an assertion or a ValueError, depending on the mistake
        raise unknown from None
    names = {part.splitname for part in wanted._relative_instructions}
    if not names <= files.keys():
        raise unknown
    parts = wanted.to_absolute({name: sum(1 for _ in _read(files[name])) for name in names})
    return itertools.chain.from_iterable(
        itertools.islice(_read(files[part.splitname]), part.from_, part.to) for part in parts
    )


def _files_by_split(config: HubSource) -> dict[str, list[DataFile]] | None:
    import datasets
    import huggingface_hub
    from datasets.exceptions import DataFilesNotFoundError
    from datasets.packaged_modules.json.json import Json

    place = config.path
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        try:
            place = huggingface_hub.snapshot_download(
                config.path, repo_type="dataset", revision=config.revision, local_files_only=True
            )
        except huggingface_hub.errors.LocalEntryNotFoundError:
            return None
    try:
        builder = datasets.load_dataset_builder(place, config.name, revision=config.revision)
    except DataFilesNotFoundError:
        return None
    options = builder.config
    if not isinstance(builder, Json) or options.data_files is None or getattr(options, "field", None) is not None:
        return None
    find = partial(_file, revision=config.revision, keep=not config.streaming)
    return {str(split): [find(url) for url in urls] for split, urls in options.data_files.items()}


def _file(url: str, revision: str | None, keep: bool) -> DataFile:
    """The file at a URL or path; `keep`: download it into the Hugging Face cache before it is read."""
    if "://" not in url:
        return DataFile.local(Path(url))
    if keep and url.startswith("hf://"):
        return DataFile(url, partial(_downloaded, url, revision))
    return DataFile(url, partial(_opened, url))


def _opened(url: str) -> IO[bytes]:
    import fsspec

    return fsspec.open(url, "rb").open()  # type: ignore[return-value]


def _downloaded(url: str, revision: str | None) -> IO[bytes]:
    from huggingface_hub import HfFileSystem, errors, hf_hub_download

    # By the revision asked for, not the commit that the URL names: offline, the cache is looked up by it.
    found: Any = HfFileSystem().resolve_path(url)
    get = partial(hf_hub_download, found.repo_id, repo_type="dataset", revision=revision)
    with contextlib.suppress(errors.EntryNotFoundError):
        get("README.md")  # it may say which files belong to a split
    return Path(get(found.path_in_repo)).open("rb")
