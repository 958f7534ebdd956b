"""From rows to token ids on disk: read, format, tokenize in parallel, publish shard by shard.

Reading and formatting happen in this thread, chunk by chunk. `tokenizers` lets go of the interpreter while it works, so
threads tokenize the next chunks meanwhile, without copying text to other processes. Each shard is published whole; a
preparation that was killed goes on after the last whole one and gives the same bytes as one that was not.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from pretune.core.config import InputError
from pretune.core.files import atomic_folder, exclusive, fingerprint, write_json
from pretune.core.progress_bar import PreparationBar
from pretune.data.config import DataConfig, FormatConfig, SourceConfig, chat_format
from pretune.data.formats.formatter import VERSION as FORMATS_VERSION
from pretune.data.formats.formatter import Formatter
from pretune.data.formats.segments import Place, Segment, Unusable
from pretune.data.sources.rows import Row, Split, check_apart, describe, empty_side, identity, rows
from pretune.data.tokenizer import Tokenizer
from pretune.data.tokens import COMPLETE_FILE, SHARD_FILE, Counts, TokenData, shard_folder

VERSION = 2
"""Raise when the same tokens would be laid out otherwise on disk."""

SHARD_TOKENS = 1 << 24
"""A shard is published once it holds this many tokens: 32 MiB, about ten seconds of work on two cores."""
CHUNK_CHARACTERS = 500_000
"""Text that one thread tokenizes at once. Shards end with a chunk."""
CHUNK_ROWS = 2_000


@dataclass(frozen=True)
class Prepared:
    """Both sides of a run's data, the folder that the training side lies in, and the same of each set mixed in."""

    train: TokenData
    validation: TokenData
    folder: Path
    parts: dict[str, Prepared]


def prepare(config: DataConfig, tokenizer: Tokenizer, cache: Path) -> Prepared:
    """Tokenize both sides of `config`, and of each set mixed in, into `cache`, unless they are there.

    Raises InputError for a source that cannot be read, has no usable rows on a side, or a cache that cannot be written;
    ConfigError where training would read what validation is measured on.
    """
    check_apart(config)
    parts = {name: prepare(config.part(name), tokenizer, cache) for name in config.mix}
    workers = config.num_workers or os.cpu_count() or 1
    validation = config.validation
    if validation.source is None:
        job = Job(config.source, config.format, tokenizer, Split.of(validation), cache)
        found = job.run(workers)
        prepared = Prepared(found["train"], found["validation"], job.folder, parts)
    else:
        job = Job(config.source, config.format, tokenizer, None, cache)
        other = Job(validation.source, config.format, tokenizer, None, cache)
        prepared = Prepared(job.run(workers)["all"], other.run(workers)["all"], job.folder, parts)
    for side, data in (("train", prepared.train), ("validation", prepared.validation)):
        if data.num_tokens == 0:
            raise _nothing_usable(config, side, data)
    return prepared


def _nothing_usable(config: DataConfig, side: Any, data: TokenData) -> InputError:
    if not data.skipped:
        return empty_side(config, side)
    return InputError(f"no row of {data.name} ({side}) can be used: {'; '.join(data.left_out())}; check data.format")


@dataclass
class Chunk:
    """Consecutive rows as segments by side, with the number of the row after the last."""

    stop_row: int
    documents: dict[str, list[list[Segment]]]
    skipped: dict[str, list[tuple[int, str]]]
    """Rows that are left out, and why."""


@dataclass
class Encoded:
    """A chunk's tokens by side: ids, length of each document, and a flag per token for "scored"."""

    stop_row: int
    counts: dict[str, Counts]
    tokens: dict[str, np.ndarray] = field(default_factory=dict)
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    scored: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return sum(counts.tokens for counts in self.counts.values())


class Job:
    """One source, format and tokenizer, on the way to the folder that is named after them."""

    def __init__(
        self,
        source: SourceConfig,
        format: FormatConfig,
        tokenizer: Tokenizer,
        split: Split | None,
        cache: Path,
    ) -> None:
        self.source, self.format, self.tokenizer, self.split = source, format, tokenizer, split
        self.sides = ("train", "validation") if split else ("all",)
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        # The tokenizer's own template decides what a conversation becomes where the format has none.
        template = vars(tokenizer.template_tokens) if chat_format(format) else None
        self.depends_on = {
            "version": [VERSION, FORMATS_VERSION, SHARD_TOKENS],
            "source": identity(source),
            "format": format.model_dump(),
            "tokenizer": tokenizer.fingerprint,
            "template": template,
            "held_out": split and split.identity(),
        }
        self.folder = cache / f"tokens-{fingerprint(self.depends_on)}"

    def run(self, workers: int) -> dict[str, TokenData]:
        """The tokens of each side; prepares what is missing."""
        if not (self.folder / COMPLETE_FILE).is_file():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with _alone(self.folder):
                    self._prepare(workers)
            except OSError as error:
                raise InputError(f"cannot write prepared data to {self.folder}: {error.strerror or error}") from error
        num_shards = json.loads((self.folder / COMPLETE_FILE).read_text())["num_shards"]
        shards = [self._shard(number) for number in range(num_shards)]
        return {side: self._open(side, shards) for side in self.sides}

    def _open(self, side: str, shards: list[dict[str, Any]]) -> TokenData:
        counts = [Counts.from_json(shard["sides"][side]) for shard in shards]
        return TokenData(self.folder, side, self.source, counts, self.dtype, self.tokenizer.eos_id)

    def _shard(self, number: int) -> dict[str, Any]:
        return json.loads((shard_folder(self.folder, number) / SHARD_FILE).read_text())

    def _prepare(self, workers: int) -> None:
        number = start_row = 0
        while shard_folder(self.folder, number).is_dir():
            start_row = self._shard(number)["stop_row"]
            number += 1
        with PreparationBar(describe(self.source)) as bar, _encoded(self, start_row, workers) as chunks:
            for first in chunks:
                start_row = self._write_shard(number, start_row, chain([first], chunks), bar)
                number += 1
        write_json(self.folder / COMPLETE_FILE, {"num_shards": number, "num_rows": start_row} | self.depends_on)

    def _write_shard(self, number: int, start_row: int, chunks: Iterator[Encoded], bar: PreparationBar) -> int:
        """Fill one shard from `chunks` and publish it; the number of the row to go on with."""
        totals = {side: Counts() for side in self.sides}
        lengths: dict[str, list[np.ndarray]] = {side: [] for side in self.sides}
        flags: dict[str, list[np.ndarray]] = {side: [] for side in self.sides}
        stop_row = start_row
        with atomic_folder(shard_folder(self.folder, number)) as folder, contextlib.ExitStack() as stack:
            files = {side: stack.enter_context((folder / f"{side}.tokens").open("wb")) for side in self.sides}
            for chunk in chunks:
                stop_row = chunk.stop_row
                for side in self.sides:
                    files[side].write(chunk.tokens[side].tobytes())
                    lengths[side].append(chunk.lengths[side])
                    flags[side].append(chunk.scored[side])
                    totals[side].add(chunk.counts[side])
                bar.advance(chunk.stop_row, chunk.num_tokens)
                if sum(total.tokens for total in totals.values()) >= SHARD_TOKENS:
                    break
            for side in self.sides:
                np.cumsum(np.concatenate(lengths[side]), dtype=np.int64).tofile(folder / f"{side}.ends")
                if totals[side].scored < totals[side].tokens:
                    np.packbits(np.concatenate(flags[side]), bitorder="little").tofile(folder / f"{side}.scored")
            sides = {side: total.to_json() for side, total in totals.items()}
            write_json(folder / SHARD_FILE, {"start_row": start_row, "stop_row": stop_row, "sides": sides})
        return stop_row


@contextlib.contextmanager
def _encoded(job: Job, start_row: int, workers: int) -> Iterator[Iterator[Encoded]]:
    """The tokenized chunks of the rows from `start_row` on, in order, a few chunks ahead of the reader."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenize")
    try:
        with _one_thread_per_call():
            yield _in_order(pool, job, start_row, workers + 2)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(pool: ThreadPoolExecutor, job: Job, start_row: int, ahead: int) -> Iterator[Encoded]:
    pending: deque[Future[Encoded]] = deque()
    for chunk in _chunks(job, start_row):
        pending.append(pool.submit(_encode, chunk, job.tokenizer, job.dtype))
        while len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _chunks(job: Job, start_row: int) -> Iterator[Chunk]:
    """Rows as segments, in chunks whose ends depend on nothing but the rows from `start_row` on."""
    formatter = Formatter(job.format, job.tokenizer.template_tokens)
    chunk, characters, first = _empty_chunk(job.sides, start_row), 0, start_row
    for number, row in enumerate(rows(job.source)):
        if number < start_row:
            continue
        side = "all" if job.split is None else job.split.side(number, row)
        characters += _add_row(chunk, side, formatter, row, Place(job.source, number))
        chunk.stop_row = number + 1
        if characters >= CHUNK_CHARACTERS or chunk.stop_row - first >= CHUNK_ROWS:
            yield chunk
            chunk, characters, first = _empty_chunk(job.sides, chunk.stop_row), 0, chunk.stop_row
    if chunk.stop_row > first:
        yield chunk


def _empty_chunk(sides: tuple[str, ...], row: int) -> Chunk:
    return Chunk(row, {side: [] for side in sides}, {side: [] for side in sides})


def _add_row(chunk: Chunk, side: str, formatter: Formatter, row: Row, place: Place) -> int:
    try:
        documents = formatter.documents(row, place)
    except Unusable as reason:
        chunk.skipped[side].append((place.row, str(reason)))
        return 0
    chunk.documents[side] += documents
    return sum(len(segment.text) for segments in documents for segment in segments)


def _encode(chunk: Chunk, tokenizer: Tokenizer, dtype: np.dtype) -> Encoded:
    """Token ids of a chunk; each document ends with EOS, scored if its last segment is."""
    encoded = Encoded(chunk.stop_row, {})
    for side, documents in chunk.documents.items():
        segments = [segment for segments in documents for segment in segments]
        ids = tokenizer.encode_segments(segments)
        parts: list[np.ndarray] = []
        flags: list[np.ndarray] = []
        lengths = np.zeros(len(documents), dtype=np.int64)
        end, at = np.array([tokenizer.eos_id], dtype=dtype), 0
        for index, document_segments in enumerate(documents):
            for segment in document_segments:
                parts.append(np.array(ids[at], dtype=dtype))
                flags.append(np.full(len(ids[at]), segment.scored))
                lengths[index] += len(ids[at])
                at += 1
            parts.append(end)
            flags.append(flags[-1][:1] if len(flags[-1]) else np.array([document_segments[-1].scored]))
            lengths[index] += 1
        encoded.tokens[side] = np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)
        encoded.scored[side] = np.concatenate(flags) if flags else np.zeros(0, dtype=bool)
        encoded.lengths[side] = lengths
        size = sum(len(segment.text.encode()) for segment in segments)
        counts = Counts(len(encoded.tokens[side]), len(documents), int(encoded.scored[side].sum()), size)
        for row, reason in chunk.skipped[side]:
            counts.skip(row, reason)
        encoded.counts[side] = counts
    return encoded


@contextlib.contextmanager
def _one_thread_per_call() -> Iterator[None]:
    """Keep `tokenizers` from spreading one call over its own threads: ours are enough, and waste less."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: other processes that want the same data wait, and find it done.

    The system lets go of the lock when a process ends, however it ends. What a killed one left half-written is removed.
    On file systems without locks, processes do the work twice: each publishes whole shards, all of the same content.
    """
    with exclusive(folder / ".lock", wait=True) as locked:
        if locked:
            for left in folder.glob(".*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
        yield
