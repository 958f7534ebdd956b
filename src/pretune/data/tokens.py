"""Read prepared token ids from disk: one folder per shard, memory-mapped, presented as one long array.

tokens-<fingerprint>/
    shard-00000/  <side>.tokens   ids, uint16 or uint32
                  <side>.ends     int64: where each document ends, counted from the shard's first token
                  <side>.hashes   uint64: a hash of each document's ids
                  <side>.scored   one bit per token, little-endian; absent if every token is scored
                  shard.json      counts, the range of source rows that the shard covers, and the size and SHA-256 of
                                  the other files; written last
    complete.json                 the number of shards; written last

Both JSON files have a fingerprint of their own content; see shard_files.py.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from pretune.data.hashing import hash_bytes
from pretune.data.shard_files import shard_folder
from pretune.data.sources.config import SourceConfig
from pretune.data.sources.rows import describe, locate


@dataclass
class Counts:
    """Counts for one side of a shard, or of all shards.

    `skipped` counts the rows left out by reason, `first_skipped` has the first such row; `spelled` counts the rows
    whose text spells a special token and stays text, by token, `first_spelled` has the first such row. `unread` names
    the columns that the format does not read.
    """

    tokens: int = 0
    documents: int = 0
    scored: int = 0
    bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    first_skipped: dict[str, int] = field(default_factory=dict)
    spelled: Counter[str] = field(default_factory=Counter)
    first_spelled: dict[str, int] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)

    def skip(self, row: int, reason: str) -> None:
        """Count a row that is left out; call it in row order."""
        self.skipped[reason] += 1
        self.first_skipped.setdefault(reason, row)

    def spell(self, row: int, tokens: Iterable[str]) -> None:
        """Count a row for each of these tokens that its text spells; call it in row order."""
        for token in tokens:
            self.spelled[token] += 1
            self.first_spelled.setdefault(token, row)

    def add(self, other: Counts) -> None:
        self.tokens += other.tokens
        self.documents += other.documents
        self.scored += other.scored
        self.bytes += other.bytes
        self.skipped.update(other.skipped)
        self.first_skipped = {**other.first_skipped, **self.first_skipped}
        self.spelled.update(other.spelled)
        self.first_spelled = {**other.first_spelled, **self.first_spelled}
        self.unread |= other.unread

    def to_json(self) -> dict[str, object]:
        ordered = {name: dict(sorted(getattr(self, name).items())) for name in ("skipped", "spelled", "first_spelled")}
        return {**vars(self), **ordered, "unread": sorted(self.unread)}

    @staticmethod
    def from_json(value: dict) -> Counts:
        counted = {name: Counter(value[name]) for name in ("skipped", "spelled")}
        return Counts(**{**value, **counted, "unread": set(value["unread"])})


class TokenData:
    """The tokens of one side, across all shards. Opening it reads no tokens."""

    def __init__(
        self, folder: Path, side: str, source: SourceConfig, shards: list[Counts], dtype: np.dtype, eos_id: int
    ) -> None:
        self.folder = folder
        self.side = side
        self.source = source
        self.name = describe(source)
        self.eos_id = eos_id
        self._dtype = dtype
        self._shards = shards
        self._starts = np.cumsum([0] + [shard.tokens for shard in shards]).tolist()
        self._maps: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
        total = Counts()
        for shard in shards:
            total.add(shard)
        self.num_tokens = total.tokens
        self.num_documents = total.documents
        self.num_scored = total.scored
        self.num_bytes = total.bytes
        self.skipped = total.skipped
        self._first_skipped = total.first_skipped
        self.unread = sorted(total.unread)
        self._spelled, self._first_spelled = total.spelled, total.first_spelled
        self.reference: dict[str, np.ndarray] | None = None
        """What a frozen model says of each sequence, as packed by the run, by name: [num_sequences, ...] each, with
        what Batch.reference holds; None where it is not stored."""

    def left_out(self) -> list[str]:
        """The reasons why rows were left out, most frequent first, each with its count and the first row."""
        return [
            f"{count:,} because {reason} (the first is {locate(self.source, self._first_skipped[reason])})"
            for reason, count in self.skipped.most_common()
        ]

    def spelled_out(self) -> str | None:
        """Which special tokens the text spells that stay text, each with its number of rows, and the first such row;
        None if there are none."""
        if not self._spelled:
            return None
        tokens = ", ".join(f"{token} in {count:,} rows" for token, count in self._spelled.most_common())
        return f"{tokens} (the first is {locate(self.source, min(self._first_spelled.values()))})"

    @cached_property
    def document_ends(self) -> np.ndarray:
        """Where each document ends (exclusive): [num_documents] int64, increasing."""
        parts = [
            np.fromfile(self._file(index, "ends"), dtype=np.int64) + start
            for index, start in enumerate(self._starts[:-1])
        ]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    @cached_property
    def document_hashes(self) -> np.ndarray:
        """A hash of the token ids of each document: [num_documents] uint64."""
        parts = [np.fromfile(self._file(index, "hashes"), dtype="<u8") for index in range(len(self._shards))]
        return np.concatenate(parts) if parts else np.zeros(0, dtype="<u8")

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that depend on the documents and their order, and not on where they come from."""
        return hash_bytes(self.document_hashes.tobytes() + self.num_scored.to_bytes(8, "little")).hex()

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens `start` to `stop` (exclusive), and which of them are scored (None: all).

        Both may be views of the memory map: copy them before changing them.
        """
        shard = bisect.bisect_right(self._starts, start) - 1
        if stop <= self._starts[shard + 1]:
            return self._read_shard(shard, start - self._starts[shard], stop - self._starts[shard])
        tokens, scored = [], []
        while start < stop:
            offset = self._starts[shard]
            end = min(stop, self._starts[shard + 1])
            part, bits = self._read_shard(shard, start - offset, end - offset)
            tokens.append(part)
            scored.append(np.ones(len(part), dtype=bool) if bits is None else bits)
            start, shard = end, shard + 1
        return np.concatenate(tokens), np.concatenate(scored)

    def any_scored(self, start: int, stop: int) -> bool:
        """Whether any of the tokens `start` to `stop` (exclusive) is scored."""
        if self.num_scored == self.num_tokens:
            return start < stop
        scored = self.read(start, stop)[1]
        return start < stop if scored is None else bool(scored.any())

    def _read_shard(self, shard: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        if shard not in self._maps:
            self._maps[shard] = self._map(shard)
        tokens, bits = self._maps[shard]
        if bits is None:
            return tokens[start:stop], None
        first = start // 8
        whole = np.unpackbits(bits[first : -(-stop // 8)], bitorder="little")
        return tokens[start:stop], whole[start - 8 * first : stop - 8 * first].astype(bool)

    def _map(self, shard: int) -> tuple[np.ndarray, np.ndarray | None]:
        counts = self._shards[shard]
        if counts.tokens == 0:  # an empty file cannot be mapped
            return np.zeros(0, dtype=self._dtype), None
        tokens = np.memmap(self._file(shard, "tokens"), dtype=self._dtype, mode="r")
        if counts.scored == counts.tokens:
            return np.asarray(tokens), None
        return np.asarray(tokens), np.asarray(np.memmap(self._file(shard, "scored"), dtype=np.uint8, mode="r"))

    def _file(self, shard: int, suffix: str) -> Path:
        return shard_folder(self.folder, shard) / f"{self.side}.{suffix}"
