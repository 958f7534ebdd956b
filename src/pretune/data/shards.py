"""Prepare a source's token ids and write them to disk, shard by shard.

Each shard is written atomically. A killed preparation resumes after the last complete shard, and writes the same bytes
as an uninterrupted one. So does one that finds a damaged shard: it and those after it are prepared again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from pretune.core.config import InputError
from pretune.core.files import atomic_folder, fingerprint
from pretune.core.progress_bar import PreparationBar
from pretune.core.terminal import warn
from pretune.data.config import DataConfig
from pretune.data.contamination import contamination
from pretune.data.encoding import SIZES, Encoded, Recipe, Sizes, encoded_chunks
from pretune.data.formats.formatter import VERSION as FORMATS_VERSION
from pretune.data.formats.template_source import rendered_by
from pretune.data.held_out import HeldOut, prepare_held_out
from pretune.data.shard_files import discard, filling, find_shards, shard_folder, write_complete, write_shard_record
from pretune.data.sources.rows import Split, check_apart, describe, empty_side, identity
from pretune.data.tokenizer import Tokenizer
from pretune.data.tokens import Counts, TokenData

VERSION = 4
"""Increment when the layout on disk changes."""


@dataclass(frozen=True)
class Prepared:
    """Both sides of a run's data, the folder of the training side, and the same for each mixed-in set."""

    train: TokenData
    validation: TokenData
    folder: Path
    parts: dict[str, Prepared]
    held_out: HeldOut | None
    """What is asked of a model on the held-out rows; None for a format without problems, and for mixed-in sets."""
    notes: tuple[str, ...] = ()
    """How many documents are repeated, and how many are on both sides, as text; empty if none are."""

    def fingerprints(self) -> dict[str, str]:
        """What identifies the documents of each side of each set, wherever they were read from."""
        found = {"train": self.train.fingerprint, "validation": self.validation.fingerprint}
        for name, part in self.parts.items():
            found |= {f"{name} {side}": digest for side, digest in part.fingerprints().items()}
        return found


def prepare(config: DataConfig, tokenizer: Tokenizer, cache: Path, sizes: Sizes = SIZES) -> Prepared:
    """Tokenize both sides of `config`, and of each mixed-in set, into `cache`, unless they are there already; and the
    problems of its held-out rows.

    Raises InputError for a source that cannot be read or has no usable rows on a side, and for a cache that cannot be
    written; ConfigError if training would read validation data.
    """
    check_apart(config)
    parts = {name: _prepare(config.part(name), tokenizer, cache, sizes) for name in config.mix}
    prepared = replace(_prepare(config, tokenizer, cache, sizes), parts=parts)
    prepared = replace(prepared, held_out=prepare_held_out(config, tokenizer.template_tokens, cache))
    sets = {"data": (config, prepared.train, prepared.validation)}
    for name, part in parts.items():
        sets[f"data.mix.{name}"] = (config.part(name), part.train, part.validation)
    return replace(prepared, notes=tuple(contamination(sets)))


def _prepare(config: DataConfig, tokenizer: Tokenizer, cache: Path, sizes: Sizes) -> Prepared:
    """Both sides of one set."""
    workers = config.num_workers or os.cpu_count() or 1
    source = config.validation.source
    if source is None:
        job = Job(Recipe(config.source, config.format, tokenizer, Split.of(config), sizes), cache)
        found = job.run(workers)
        prepared = Prepared(found["train"], found["validation"], job.folder, {}, None)
    else:
        job = Job(Recipe(config.source, config.format, tokenizer, None, sizes), cache)
        other = Job(Recipe(source, config.format, tokenizer, None, sizes), cache)
        prepared = Prepared(job.run(workers)["all"], other.run(workers)["all"], job.folder, {}, None)
    for side, data in (("train", prepared.train), ("validation", prepared.validation)):
        if data.num_tokens == 0:
            raise _nothing_usable(config, side, data)
    return prepared


def _nothing_usable(config: DataConfig, side: Any, data: TokenData) -> InputError:
    if not data.skipped:
        return empty_side(config, side)
    return InputError(f"no row of {data.name} ({side}) can be used: {'; '.join(data.left_out())}; check data.format")


class Job:
    """Prepares the tokens of a recipe, in a folder of the cache that is named after the recipe's fingerprint."""

    def __init__(self, recipe: Recipe, cache: Path) -> None:
        self.recipe, self.sides = recipe, recipe.sides
        self.depends_on = {
            "version": [VERSION, FORMATS_VERSION, recipe.sizes.shard_tokens],
            "source": identity(recipe.source, cache),
            "format": recipe.format.model_dump(),
            "tokenizer": recipe.tokenizer.fingerprint,
            "template": rendered_by(recipe.format, recipe.tokenizer.template_tokens),
            "held_out": recipe.split and asdict(recipe.split),
        }
        self.folder = cache / f"tokens-{fingerprint(self.depends_on)}"

    def run(self, workers: int) -> dict[str, TokenData]:
        """The tokens of each side; prepares what is missing or damaged."""
        found = find_shards(self.folder, self.depends_on, workers)
        shards = found.shards
        if not found.complete:
            with filling(self.folder):
                shards = self._prepare(workers)
        return {side: self._open(side, shards) for side in self.sides}

    def _open(self, side: str, shards: list[dict[str, Any]]) -> TokenData:
        counts = [Counts.from_json(shard["sides"][side]) for shard in shards]
        recipe = self.recipe
        return TokenData(self.folder, side, recipe.source, counts, recipe.dtype, recipe.tokenizer.eos_id)

    def _prepare(self, workers: int) -> list[dict[str, Any]]:
        """Prepare the shards that are missing; return the content of every shard.json."""
        found = find_shards(self.folder, self.depends_on, workers)  # again: another process may have been at work
        shards = found.shards
        if found.complete:
            return shards
        start_row = shards[-1]["stop_row"] if shards else 0
        if found.fault is not None:
            again = f"it is prepared again from row {start_row:,} on"
            warn(f"prepared data in {self.folder} is damaged ({found.fault}): {again}")
            discard(self.folder, len(shards))
        title = describe(self.recipe.source)
        with PreparationBar(title) as bar, encoded_chunks(self.recipe, start_row, workers) as chunks:
            for first in chunks:
                shards.append(self._write_shard(len(shards), start_row, chain([first], chunks), bar))
                start_row = shards[-1]["stop_row"]
        write_complete(self.folder, len(shards), start_row, self.depends_on)
        return shards

    def _write_shard(
        self, number: int, start_row: int, chunks: Iterator[Encoded], bar: PreparationBar
    ) -> dict[str, Any]:
        """Fill one shard from `chunks` and publish it; return its rows and counts."""
        totals = {side: Counts() for side in self.sides}
        lengths: dict[str, list[np.ndarray]] = {side: [] for side in self.sides}
        hashes: dict[str, list[np.ndarray]] = {side: [] for side in self.sides}
        flags: dict[str, list[np.ndarray]] = {side: [] for side in self.sides}
        stop_row = start_row
        with atomic_folder(shard_folder(self.folder, number)) as folder, contextlib.ExitStack() as stack:
            files = {side: stack.enter_context((folder / f"{side}.tokens").open("wb")) for side in self.sides}
            for chunk in chunks:
                stop_row = chunk.stop_row
                for side in self.sides:
                    files[side].write(chunk.tokens[side].tobytes())
                    lengths[side].append(chunk.lengths[side])
                    hashes[side].append(chunk.hashes[side])
                    flags[side].append(chunk.scored[side])
                    totals[side].add(chunk.counts[side])
                bar.advance(chunk.stop_row, chunk.num_tokens)
                if sum(total.tokens for total in totals.values()) >= self.recipe.sizes.shard_tokens:
                    break
            for side in self.sides:
                np.cumsum(np.concatenate(lengths[side]), dtype=np.int64).tofile(folder / f"{side}.ends")
                np.concatenate(hashes[side]).tofile(folder / f"{side}.hashes")
                if totals[side].scored < totals[side].tokens:
                    np.packbits(np.concatenate(flags[side]), bitorder="little").tofile(folder / f"{side}.scored")
                files[side].close()  # before it is measured
            sides = {side: total.to_json() for side, total in totals.items()}
            content = {"start_row": start_row, "stop_row": stop_row, "sides": sides}
            write_shard_record(folder, self.folder.name, content)
        return content
