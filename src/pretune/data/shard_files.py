"""What a folder of prepared shards holds, checked whenever it is opened: each file against the size and the SHA-256
that were recorded when it was written.

Reading everything takes about 0.7 s per GB and thread (700 million tokens of 16 bits), and leaves the files in memory
for what reads them next.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pretune.core.config import InputError
from pretune.core.files import exclusive, measure, read_sealed, write_sealed

SHARD_FILE = "shard.json"
COMPLETE_FILE = "complete.json"


@dataclass(frozen=True)
class Found:
    """The shards that can be used."""

    shards: list[dict[str, Any]]
    """The content of shard.json of each whole shard, from the first to the one before the first that is not whole."""
    complete: bool
    """Whether they are all shards of the data."""
    fault: str | None
    """What is damaged, in a few words; None if nothing is (perhaps because nothing is there yet)."""


def shard_folder(folder: Path, number: int) -> Path:
    """The folder of a shard."""
    return folder / f"shard-{number:05d}"


@contextlib.contextmanager
def filling(folder: Path) -> Iterator[None]:
    """Make the folder and hold its lock, so that other processes that need the same data wait until it is complete.

    The operating system releases the lock when a process ends, however it ends. Partial files of a killed process are
    removed. On file systems without locks, processes duplicate the work: each publishes whole shards with equal
    content. Raises InputError if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / ".lock", wait=True) as locked:
            if locked:
                for left in folder.glob(".*.tmp"):
                    shutil.rmtree(left, ignore_errors=True)
            yield
    except OSError as error:
        raise InputError(
            f"cannot write prepared data to {folder}: {(error.strerror or str(error)).lower()}; free that place or set "
            "the environment variable PRETUNE_CACHE to another folder"
        ) from error


def write_shard_record(folder: Path, data: str, content: Mapping[str, Any]) -> None:
    """Write shard.json, last of a shard's files: `content`, the data (the name of its folder) and all other files."""
    files = {path.name: measure(path) for path in sorted(folder.iterdir())}
    write_sealed(folder / SHARD_FILE, {**content, "data": data, "files": files})


def write_complete(folder: Path, num_shards: int, num_rows: int, depends_on: Mapping[str, Any]) -> None:
    """Write complete.json, last of all files."""
    write_sealed(folder / COMPLETE_FILE, {"num_shards": num_shards, "num_rows": num_rows, **depends_on})


def find_shards(folder: Path, depends_on: Mapping[str, Any], workers: int) -> Found:
    """The whole shards in `folder`; every file is read, by `workers` threads."""
    num_shards, fault = _num_shards(folder, depends_on)
    count = 0
    while shard_folder(folder, count).exists() or count < (num_shards or 0):
        count += 1
    shards: list[dict[str, Any]] = []
    with ThreadPoolExecutor(workers, thread_name_prefix="check") as pool:
        for found in pool.map(partial(_record, folder), range(count)):
            if isinstance(found, str):
                fault = fault or found
                break
            if found["start_row"] != (shards[-1]["stop_row"] if shards else 0):
                fault = fault or f"{shard_folder(folder, len(shards)).name} does not follow the shard before it"
                break
            shards.append(found)
        pool.shutdown(cancel_futures=True)
    if fault is None and num_shards is not None and count > num_shards:
        fault = f"there are {count} shards instead of {num_shards}"
    return Found(shards, num_shards is not None and fault is None, fault)


def discard(folder: Path, first: int) -> None:
    """Delete complete.json, then all shards but the first `first`."""
    kept = {shard_folder(folder, number) for number in range(first)}
    for path in [folder / COMPLETE_FILE, *sorted(set(folder.glob("shard-*")) - kept)]:
        if path.is_dir() and not path.is_symlink():
            # Renamed first, so that a kill leaves no part of a shard under its name.
            aside = Path(tempfile.mkdtemp(dir=folder, prefix=f".{path.name}.", suffix=".tmp"))
            os.rename(path, aside / path.name)
            shutil.rmtree(aside)
        else:
            path.unlink(missing_ok=True)


def _num_shards(folder: Path, depends_on: Mapping[str, Any]) -> tuple[int | None, str | None]:
    """The number of shards of complete data, else None; and what is wrong with complete.json."""
    try:
        content = read_sealed(folder / COMPLETE_FILE)
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError):
        return None, f"{COMPLETE_FILE} is not what was written"
    if any(content.get(key) != value for key, value in json.loads(json.dumps(depends_on)).items()):
        return None, f"{COMPLETE_FILE} is of other data"
    return content["num_shards"], None


def _record(folder: Path, number: int) -> dict[str, Any] | str:
    """The content of a shard's shard.json if the shard is whole and belongs to `folder`, else what is wrong with it."""
    shard = shard_folder(folder, number)
    path = shard / SHARD_FILE
    try:
        content = read_sealed(path)
        if content.get("data") != folder.name:
            return f"{shard.name} is of other data"
        for name, written in content["files"].items():
            path = shard / name
            if path.stat().st_size != written["bytes"] or measure(path) != written:
                raise ValueError
    except OSError as error:
        return f"{shard.name}/{path.name} cannot be read: {(error.strerror or str(error)).lower()}"
    except ValueError:
        return f"{shard.name}/{path.name} is not what was written"
    return content
