"""Tokenize the segments of documents separately, so that joined they are the document.

Some tokenizers put a space before a text, so that its first word is the same token as within a sentence (Llama 2,
Mistral, T5). The rule: the space is put where transformers' tokenizer puts it for the document's whole text, at its
beginning and, for some, after a special token; never where a segment continues a text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain, islice
from typing import TYPE_CHECKING, Literal

from pretune.data.beginning import missing_beginning
from pretune.data.formats.segments import Filler, Segment
from pretune.data.long_texts import PIECE_CHARACTERS, cut, groups
from pretune.data.pipeline import steps

if TYPE_CHECKING:
    import tokenizers

Prefix = Literal["always", "first"]
"""A space is put before each piece of text (also after a special token), or before the first piece only."""


class SegmentEncoder:
    """Encodes documents with a tokenizer that treats text that spells a special token as ordinary text."""

    def __init__(
        self, backend: tokenizers.Tokenizer, beginning: Sequence[int] = (), piece_characters: int = PIECE_CHARACTERS
    ) -> None:
        """beginning: the ids that begin each document."""
        self._plain, self._beginning, self._piece_characters = backend, tuple(beginning), piece_characters
        self._prefix = prefix_of(backend)
        self._special_ids = {index for index, one in backend.get_added_tokens_decoder().items() if one.special}

    @property
    def rule(self) -> str:
        """What determines a document's ids besides the tokenizer, for its fingerprint; empty where there is no space to
        put before a text."""
        return "" if self._prefix is None else "\na segment continues a text without a space before it"

    def encode(self, documents: Sequence[Sequence[Segment]]) -> list[list[list[int]]]:
        """The ids of each segment of each document. A segment's ids do not depend on what follows it, so that a prompt
        has the same ids in training and in generation."""
        found = self._encode_whole(documents)
        for segments, ids in zip(documents, found, strict=True):
            if any(isinstance(segment, Filler) for segment in segments):
                _fill(segments, ids, len(missing_beginning(self._beginning, ids)))
        return found

    def _encode_whole(self, documents: Sequence[Sequence[Segment]]) -> list[list[list[int]]]:
        if all(len(segment.text) <= self._piece_characters for segments in documents for segment in segments):
            return self._encode(documents)
        pieces = [[self._pieces(segment) for segment in segments] for segments in documents]
        found = self._encode([list(chain.from_iterable(document)) for document in pieces])
        rests = [iter(ids) for ids in found]
        return [
            [list(chain.from_iterable(islice(rest, len(segment)))) for segment in document]
            for document, rest in zip(pieces, rests, strict=True)
        ]

    def _pieces(self, segment: Segment) -> list[Segment]:
        """A segment, cut if it is long; its pieces continue each other."""
        if len(segment.text) <= self._piece_characters:
            return [segment]
        backend = self._with_special_tokens if segment.special else self._plain
        if self._prefix is not None:
            backend = without_prefix(backend) if segment.special else self._unprefixed

        def encode(texts: list[str]) -> list[list[int]]:
            return [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=False)]

        return [replace(segment, text=text) for text in cut(segment.text, encode, self._piece_characters)]

    def _encode(self, documents: Sequence[Sequence[Segment]]) -> list[list[list[int]]]:
        flat = [segment for segments in documents for segment in segments]
        ids: list[list[int]] = [[]] * len(flat)
        firsts: list[int] = [0] * len(flat)
        """Where the first special token begins in each segment, in characters."""
        for special in {segment.special for segment in flat}:
            backend = self._with_special_tokens if special else self._plain
            chosen = (number for number, segment in enumerate(flat) if segment.special == special)
            encode = backend.encode_batch_fast if self._prefix is None else backend.encode_batch  # which has offsets
            for group in groups(chosen, [len(segment.text) for segment in flat]):
                found = encode([flat[at].text for at in group], add_special_tokens=False)
                for at, one in zip(group, found, strict=True):
                    ids[at] = one.ids
                    if self._prefix is not None:
                        first = self._first_special(flat[at], one.ids)
                        firsts[at] = one.offsets[first][0] if first < len(one.ids) else len(flat[at].text)
        if self._prefix is not None:
            for group in groups(list(self._continuing(documents, ids)), firsts):
                heads = [flat[at].text[: firsts[at]] for at in group]
                found = self._unprefixed.encode_batch_fast(heads, add_special_tokens=False)
                for at, head in zip(group, found, strict=True):
                    ids[at] = [*head.ids, *ids[at][self._first_special(flat[at], ids[at]) :]]
        rest = iter(ids)
        return [[next(rest) for _ in segments] for segments in documents]

    def _first_special(self, segment: Segment, ids: Sequence[int]) -> int:
        """The place of a segment's first special token in its ids; their number if there is none."""
        special = (place for place, one in enumerate(ids) if segment.special and one in self._special_ids)
        return next(special, len(ids))

    def _continuing(self, documents: Sequence[Sequence[Segment]], ids: Sequence[Sequence[int]]) -> Iterator[int]:
        """The numbers of the segments that begin where no space is put."""
        number = -1
        for segments in documents:
            begins = True
            for segment in segments:
                number += 1
                if not segment.text:
                    continue
                if not begins:
                    yield number
                ends_special = segment.special and len(ids[number]) > 0 and ids[number][-1] in self._special_ids
                begins = ends_special and self._prefix == "always"

    @cached_property
    def _with_special_tokens(self) -> tokenizers.Tokenizer:
        """The same tokenizer, except that text that spells a special token becomes that token."""
        import tokenizers

        backend = tokenizers.Tokenizer.from_str(self._plain.to_str())
        backend.encode_special_tokens = False
        return backend

    @cached_property
    def _unprefixed(self) -> tokenizers.Tokenizer:
        return without_prefix(self._plain)


def _fill(segments: Sequence[Segment], ids: list[list[int]], start: int) -> None:
    """Cut the fillers of a document, whose segments have these ids, `start` of them before it, to their lengths."""
    fixed = (len(one) for segment, one in zip(segments, ids, strict=True) if not _gives_way(segment))
    taken, at = start + sum(fixed), 0.0
    for place, segment in enumerate(segments):
        if isinstance(segment, Filler):
            left = max(segment.length - taken, 0)
            begin, at = round(at * left), at + segment.share
            ids[place] = ids[place][: round(at * left) - begin]


def _gives_way(segment: Segment) -> bool:
    """Whether a segment does not count towards the length of fillers."""
    return segment.scored or isinstance(segment, Filler)


def prefix_of(backend: tokenizers.Tokenizer) -> Prefix | None:
    """Where a tokenizer puts a space before a text; None for nowhere.

    Where an earlier step splits the text into words, the space is not meant: it marks the beginning of each word.
    """
    parts = json.loads(backend.to_str())
    if any(step["type"] == "Prepend" for step in steps(parts, "normalizer")):
        return "always"
    first = next(steps(parts, "pre_tokenizer"), {})
    if first.get("type") == "Metaspace":
        return None if first["prepend_scheme"] == "never" else first["prepend_scheme"]
    return "always" if first.get("type") == "ByteLevel" and first["add_prefix_space"] else None


def without_prefix(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy of a tokenizer that puts no space before a text."""
    import tokenizers

    parts = json.loads(backend.to_str())
    for step in steps(parts, "normalizer"):
        if step["type"] == "Prepend":
            step["prepend"] = ""
    first = next(steps(parts, "pre_tokenizer"), {})
    if first.get("type") == "Metaspace":
        first["prepend_scheme"] = "never"
    if first.get("type") == "ByteLevel":
        first["add_prefix_space"] = False
    copy = tokenizers.Tokenizer.from_str(json.dumps(parts))
    copy.encode_special_tokens = backend.encode_special_tokens
    return copy
