"""Rows to token ids: read and formatted in this thread, chunk by chunk, and tokenized by others.

`tokenizers` releases the interpreter's lock while it works, so threads tokenize the next chunks meanwhile, without
copying text to other processes.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from pretune.data.formats.build import build_formatter
from pretune.data.formats.config import FormatConfig
from pretune.data.formats.formatter import Formatter
from pretune.data.formats.segments import Place, Segment, Unusable
from pretune.data.sources.config import SourceConfig
from pretune.data.sources.rows import Row, Split, rows
from pretune.data.tokenizer import Tokenizer
from pretune.data.tokens import Counts


@dataclass(frozen=True)
class Sizes:
    """How tokens are portioned on their way to the disk."""

    shard_tokens: int = 1 << 24
    """A shard is published once it holds this many tokens: 32 MiB, about ten seconds of work on two cores."""
    chunk_characters: int = 500_000
    """Text that one thread tokenizes at once. Shards end with a chunk."""
    chunk_rows: int = 2_000


SIZES = Sizes()


@dataclass(frozen=True)
class Recipe:
    """What the tokens of a source are made with; `split` is None where all rows are of one side."""

    source: SourceConfig
    format: FormatConfig
    tokenizer: Tokenizer
    split: Split | None
    sizes: Sizes = SIZES

    @property
    def sides(self) -> tuple[str, ...]:
        return ("train", "validation") if self.split else ("all",)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.uint32)


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


@contextlib.contextmanager
def encoded_chunks(recipe: Recipe, start_row: int, workers: int) -> Iterator[Iterator[Encoded]]:
    """The tokenized chunks of the rows from `start_row` on, in order, a few chunks ahead of the reader."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenize")
    try:
        with _one_thread_per_call():
            yield _in_order(pool, recipe, start_row, workers + 2)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(pool: ThreadPoolExecutor, recipe: Recipe, start_row: int, ahead: int) -> Iterator[Encoded]:
    pending: deque[Future[Encoded]] = deque()
    for chunk in _chunks(recipe, start_row):
        pending.append(pool.submit(_encode, chunk, recipe.tokenizer, recipe.dtype))
        while len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _chunks(recipe: Recipe, start_row: int) -> Iterator[Chunk]:
    """Rows as segments, in chunks whose ends depend on nothing but the rows from `start_row` on."""
    formatter = build_formatter(recipe.format, recipe.tokenizer.template_tokens)
    chunk, characters, first = _empty_chunk(recipe.sides, start_row), 0, start_row
    for number, row in enumerate(rows(recipe.source)):
        if number < start_row:
            continue
        side = "all" if recipe.split is None else recipe.split.side(number, row)
        characters += _add_row(chunk, side, formatter, row, Place(recipe.source, number))
        chunk.stop_row = number + 1
        if characters >= recipe.sizes.chunk_characters or chunk.stop_row - first >= recipe.sizes.chunk_rows:
            yield chunk
            chunk, characters, first = _empty_chunk(recipe.sides, chunk.stop_row), 0, chunk.stop_row
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
