"""Turn rows into token ids: the main thread reads and formats them in chunks, and other threads tokenize the chunks.

`tokenizers` releases the GIL while it works, so threads run in parallel without copying text to other processes.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from pretune.data.formats.build import build_formatter
from pretune.data.formats.config import FormatConfig
from pretune.data.formats.segments import ColumnCheck, Filler, Place, Segment, Unusable
from pretune.data.formats.special_tokens import spellings
from pretune.data.hashing import hash_bytes
from pretune.data.sources.config import SourceConfig
from pretune.data.sources.rows import Row, Split, rows
from pretune.data.tokenizer import Tokenizer
from pretune.data.tokens import Counts


@dataclass(frozen=True)
class Sizes:
    """Sizes of shards and chunks."""

    shard_tokens: int = 1 << 24
    """A shard is published once it holds this many tokens: 32 MiB, about ten seconds of work on two cores."""
    chunk_characters: int = 500_000
    """Characters that one thread tokenizes at once. A shard always ends at the end of a chunk."""
    chunk_rows: int = 2_000


SIZES = Sizes()


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the tokens of a source; `split` is None if all rows are on one side."""

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
    """Consecutive rows as segments, by side; `stop_row` is the number of the row after the last one."""

    stop_row: int
    documents: dict[str, list[list[Segment]]]
    counts: dict[str, Counts]
    """What is known before anything is tokenized: the rows left out, columns not read, special tokens spelled out."""


@dataclass
class Encoded:
    """A chunk's tokens by side: ids, the length and the hash of each document, and the loss mask (scored or not, per
    token)."""

    stop_row: int
    counts: dict[str, Counts]
    tokens: dict[str, np.ndarray] = field(default_factory=dict)
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    hashes: dict[str, np.ndarray] = field(default_factory=dict)
    scored: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return sum(counts.tokens for counts in self.counts.values())


@contextlib.contextmanager
def encoded_chunks(recipe: Recipe, start_row: int, workers: int) -> Iterator[Iterator[Encoded]]:
    """The tokenized chunks of the rows from `start_row` on, in order, computed a few chunks ahead of the reader."""
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
    """Rows as segments, in chunks whose boundaries depend only on the rows from `start_row` on."""
    reader = _Reader(recipe, ColumnCheck(passed=start_row > 0))
    chunk, characters, first = _empty_chunk(recipe.sides, start_row), 0, start_row
    for number, row in enumerate(rows(recipe.source, reader.needed)):
        if number < start_row:
            continue
        side = "all" if recipe.split is None else recipe.split.side(number, row)
        characters += reader.add(chunk, side, row, number)
        chunk.stop_row = number + 1
        if characters >= recipe.sizes.chunk_characters or chunk.stop_row - first >= recipe.sizes.chunk_rows:
            yield chunk
            chunk, characters, first = _empty_chunk(recipe.sides, chunk.stop_row), 0, chunk.stop_row
    reader.columns.end()
    if chunk.stop_row > first:
        yield chunk


def _empty_chunk(sides: tuple[str, ...], row: int) -> Chunk:
    return Chunk(row, {side: [] for side in sides}, {side: Counts() for side in sides})


class _Reader:
    """Adds rows to chunks as segments."""

    def __init__(self, recipe: Recipe, columns: ColumnCheck) -> None:
        self._formatter = build_formatter(recipe.format, recipe.tokenizer.template_tokens)
        self._spellings = spellings(recipe.tokenizer.template_tokens)
        self._source, self.columns = recipe.source, columns
        self.needed = self._formatter.columns_needed
        """The columns that decide what becomes of a row; None: all of them."""
        if self.needed is not None and recipe.split is not None:
            self.needed |= recipe.split.columns_read

    def add(self, chunk: Chunk, side: str, row: Row, number: int) -> int:
        """Add a row to one side of a chunk, or count it as left out; return its number of characters."""
        counts = chunk.counts[side]
        try:
            documents = self._formatter.documents(row, Place(self._source, number))
        except Unusable as reason:
            self.columns.add(reason)
            counts.skip(number, str(reason))
            return 0
        self.columns.add(None)
        chunk.documents[side] += documents
        counts.unread |= self._formatter.unread(row)
        segments = [segment for document in documents for segment in document]
        plain = (segment.text for segment in segments if not segment.special)
        counts.spell(number, {token for text in plain for token in self._spellings.findall(text)})
        return sum(len(segment.text) for segment in segments)


def _encode(chunk: Chunk, tokenizer: Tokenizer, dtype: np.dtype) -> Encoded:
    """Tokenize a chunk; each document begins with BOS, if the tokenizer has it so, which is not scored, and ends with
    EOS, which is scored if its last segment is."""
    encoded = Encoded(chunk.stop_row, {})
    for side, documents in chunk.documents.items():
        ids = tokenizer.encode_documents(documents)
        parts: list[np.ndarray] = []
        flags: list[np.ndarray] = []
        lengths = np.zeros(len(documents), dtype=np.int64)
        end = np.array([tokenizer.eos_id], dtype=dtype)
        for index, document in enumerate(documents):
            if start := tokenizer.document_start(ids[index]):
                parts.append(np.array(start, dtype=dtype))
                flags.append(np.zeros(len(start), dtype=bool))
                lengths[index] += len(start)
            for segment, found in zip(document, ids[index], strict=True):
                parts.append(np.array(found, dtype=dtype))
                flags.append(np.full(len(found), segment.scored))
                lengths[index] += len(found)
            parts.append(end)
            flags.append(flags[-1][:1] if len(flags[-1]) else np.array([document[-1].scored]))
            lengths[index] += 1
        encoded.tokens[side] = np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)
        encoded.scored[side] = np.concatenate(flags) if flags else np.zeros(0, dtype=bool)
        encoded.lengths[side], encoded.hashes[side] = lengths, _hashes(encoded.tokens[side], lengths)
        size = sum(_bytes(*pair, tokenizer) for pair in zip(chain(*documents), chain(*ids), strict=True))
        counts = Counts(len(encoded.tokens[side]), len(documents), int(encoded.scored[side].sum()), size)
        counts.add(chunk.counts[side])
        encoded.counts[side] = counts
    return encoded


def _bytes(segment: Segment, ids: list[int], tokenizer: Tokenizer) -> int:
    """Bytes of a segment's text, of a filler's that is left."""
    return len((tokenizer.decode(ids) if isinstance(segment, Filler) else segment.text).encode())


def _hashes(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A hash of the token ids of each document: [len(lengths)] uint64."""
    ends = np.cumsum(lengths) * tokens.itemsize
    content, begins = memoryview(tokens.tobytes()), [0, *ends[:-1].tolist()]
    hashes = [hash_bytes(content[begin:end]) for begin, end in zip(begins, ends.tolist(), strict=False)]
    return np.frombuffer(b"".join(hashes), dtype="<u8")


@contextlib.contextmanager
def _one_thread_per_call() -> Iterator[None]:
    """Stop `tokenizers` from using its own threads within a call: ours are enough and have less overhead."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
