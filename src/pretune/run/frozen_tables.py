"""What a frozen model says of all of a run's data, computed once and kept in the cache.

Each side of each set of data has a folder of tables (.npy), one for each name in Batch.reference and a row for each
sequence; complete.json, written last, has their hashes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretune.compute.precision import autocast
from pretune.core.config import InputError
from pretune.core.files import atomic_folder, fingerprint, measure, read_sealed, write_sealed
from pretune.core.progress_bar import PreparationBar
from pretune.core.terminal import warn
from pretune.core.units import memory
from pretune.data.config import DataConfig
from pretune.data.loader import Loader
from pretune.data.packing import VERSION as PACKING_VERSION
from pretune.data.shards import Prepared
from pretune.data.tokens import TokenData
from pretune.objectives.objective import frozen_outputs
from pretune.run.config import RunConfig
from pretune.run.folder import cache_folder
from pretune.run.parts import Frozen, Parts

VERSION = 3
"""Increment when the same weights and data would give other tables, or other files: it is part of the cache key."""

_RECORD = "complete.json"

Row = tuple[tuple[int, ...], np.dtype]
"""Shape and type of what a table holds of one sequence."""


@dataclass(frozen=True)
class Tables:
    """What there is to store."""

    title: str
    """What they hold, as text: `the teacher's outputs`."""
    depends_on: Mapping[str, Any]
    """What their values depend on, beside the data."""
    rows: Callable[[Loader], dict[str, Row]]
    """What each table holds, by name; the model may say more along the first axis, which is left out."""
    frozen: Callable[[], Frozen]
    """The model; called only where a table is missing."""
    smaller: str
    """What to do if they do not fit on the disk."""


def with_tables(config: RunConfig, parts: Parts, tables: Tables, validation_only: bool) -> Parts:
    """`parts` whose data has what a frozen model says of it, from the cache or computed and stored there.

    Raises InputError if it cannot be written.
    """

    def add(data: TokenData, section: DataConfig) -> TokenData:
        if validation_only and data.side == "train":
            return data
        found = copy.copy(data)
        found.reference = _read_or_computed(config, parts.device, tables, data, section)
        return found

    def added(data: Prepared, section: DataConfig) -> Prepared:
        others = {name: added(part, section.part(name)) for name, part in data.parts.items()}
        sides = {"train": add(data.train, section), "validation": add(data.validation, section)}
        return dataclasses.replace(data, parts=others, **sides)

    return dataclasses.replace(parts, data=added(parts.data, config.data))


def _read_or_computed(
    config: RunConfig, device: torch.device, tables: Tables, data: TokenData, section: DataConfig
) -> dict[str, np.ndarray]:
    depends_on = {
        **tables.depends_on,
        "version": [VERSION, PACKING_VERSION],
        "data": [data.folder.name, data.side],
        "sequences": [section.sequence_length, section.packing.model_dump()],
    }
    folder, loader = cache_folder() / f"reference-{fingerprint(depends_on)}", Loader(data, section, config.seed)
    if not _is_whole(folder):
        rows = tables.rows(loader)
        _check_room(folder, loader, rows, tables)
        try:
            if folder.exists():
                warn(f"{tables.title} in {folder} were damaged: computed again")
                shutil.rmtree(folder)
            with atomic_folder(folder) as temporary:
                _write(temporary, rows, loader, _said(config, device, tables, loader, data.side))
        except OSError as error:
            raise InputError(f"cannot write {tables.title} to {folder}: {error.strerror}") from None
    return {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}


def _is_whole(folder: Path) -> bool:
    """Whether tables are there, and their content is what was written."""
    try:
        return all(measured == measure(folder / file) for file, measured in read_sealed(folder / _RECORD).items())
    except (OSError, ValueError):
        return False


def _check_room(folder: Path, loader: Loader, rows: Mapping[str, Row], tables: Tables) -> None:
    """Say how much will be written; InputError if there is not as much room."""
    size = loader.num_sequences * sum(dtype.itemsize * int(np.prod(shape)) for shape, dtype in rows.values())
    free = shutil.disk_usage(folder.parent).free
    if size > free:
        raise InputError(
            f"{tables.title} of {loader.num_sequences:,} sequences take {memory(size)}, but only {memory(free)} are "
            f"free in {folder.parent}: {tables.smaller}, or set PRETUNE_CACHE to a folder on another disk"
        )
    warn(f"note: {tables.title} of {loader.num_sequences:,} sequences take {memory(size)} in {folder}")


def _said(
    config: RunConfig, device: torch.device, tables: Tables, loader: Loader, side: str
) -> Iterator[dict[str, Tensor]]:
    """What the model says of all sequences, in batches."""
    frozen, micro_batch = tables.frozen(), config.evaluation.micro_batch
    outputs = frozen_outputs(config.stage.objective, config.model.vocab_size)
    with PreparationBar(f"{tables.title}, {side}") as bar:
        for number, batch in enumerate(loader.batches(micro_batch), start=1):
            with autocast(config.precision, device):
                filled = frozen.fill(batch.to(device), outputs)
            assert filled.reference is not None
            yield dict(filled.reference)
            bar.advance(number * micro_batch, batch.inputs.numel())


def _write(folder: Path, rows: Mapping[str, Row], loader: Loader, batches: Iterator[dict[str, Tensor]]) -> None:
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.npy").open("wb")) for name in rows}
        for name, (shape, dtype) in rows.items():
            descr = np.lib.format.dtype_to_descr(dtype)
            whole = {"descr": descr, "fortran_order": False, "shape": (loader.num_sequences, *shape)}
            np.lib.format.write_array_header_1_0(files[name], whole)
        left = loader.num_sequences
        for batch in batches:
            for name, (shape, dtype) in rows.items():
                # Not through a memory map, in which a full disk would be a signal and not an error.
                files[name].write(batch[name][:left, : shape[0]].cpu().numpy().astype(dtype).tobytes())
            left -= min(left, len(batch[next(iter(rows))]))
    write_sealed(folder / _RECORD, {f"{name}.npy": measure(folder / f"{name}.npy") for name in rows})
