"""Pack documents into sequences of `sequence_length` tokens.

stream      documents concatenated and cut anywhere: the last target of a sequence is the first input of the next.
documents   whole documents packed by best fit; the rest of a sequence is padding.
pairs       the same with two documents at a time: documents 2 k and 2 k + 1 of a sequence are a pair.
none        one document per sequence, padded.

A document longer than a sequence is cut, split over several, or dropped. A cut answer has no end-of-document token to
learn; a piece of a long document without scored tokens is left out.

A target is the token that follows its input if that token is scored, else IGNORE. The first token of a document cannot
be predicted from anything in the document: it is a target only in a stream without isolation.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from pretune.core.batch import IGNORE
from pretune.core.files import atomic_folder, write_json
from pretune.data.config import DataConfig
from pretune.data.tokens import TokenData

VERSION = 3
"""Increment when packing the same documents would give a different result: it is part of the name of saved plans."""

TooLong = Literal["cut", "split", "drop"]


@dataclass(frozen=True)
class Sequences:
    """Sequences to be filled in place, with Batch's layout: inputs [B, T], targets [B, T], documents [B, T] or None,
    reference by name [B, ...] or None. Initially they are all padding: EOS as input, IGNORE as target."""

    inputs: np.ndarray
    targets: np.ndarray
    documents: np.ndarray | None
    reference: dict[str, np.ndarray] | None = None


class StreamSequences:
    """Documents concatenated and cut every `sequence_length` tokens; only the last sequence can have padding."""

    def __init__(self, data: TokenData, sequence_length: int, isolate: bool) -> None:
        self.data, self.length = data, sequence_length
        # The last token is only a target: a sequence of it alone would have nothing to predict.
        self.num_sequences = max(0, -(-(data.num_tokens - 1) // sequence_length))
        self._ends = data.document_ends if isolate else None
        padding = self.num_sequences * sequence_length - max(0, data.num_tokens - 1)
        self.report = {"sequences": self.num_sequences, "padding": padding, "too_long": 0, "lost_tokens": 0}

    def fill(self, sequence: int, sequences: Sequences, at: int) -> None:
        """Write sequence `sequence` of the data into `sequences` at `at`."""
        start = sequence * self.length
        stop = min(start + self.length + 1, self.data.num_tokens)
        tokens, scored = self.data.read(start, stop)
        used = stop - start - 1
        sequences.inputs[at, :used] = tokens[:-1]
        sequences.targets[at, :used] = _targets(tokens, scored)
        if sequences.documents is None or self._ends is None:
            return
        # Ends inside (start, start + used]: if a document ends at e, token e begins another document.
        first, last = np.searchsorted(self._ends, [start, start + used], side="right")
        ends = self._ends[first:last] - start
        sequences.targets[at, ends[ends <= used] - 1] = IGNORE
        begins = np.zeros(self.length, dtype=np.int32)
        begins[ends[ends < self.length]] = 1
        if used < self.length:
            begins[used] = 1
        sequences.documents[at] = np.cumsum(begins)


class PlannedSequences:
    """Sequences of document pieces, as laid out in a plan."""

    def __init__(self, data: TokenData, plan: Plan) -> None:
        self.data, self.plan = data, plan
        self.num_sequences = len(plan.sequence_starts) - 1
        self.report = plan.report

    def fill(self, sequence: int, sequences: Sequences, at: int) -> None:
        """Write sequence `sequence` of the data into `sequences` at `at`."""
        first, last = self.plan.sequence_starts[sequence], self.plan.sequence_starts[sequence + 1]
        column = 0
        for number, piece in enumerate(range(first, last)):
            start, length = int(self.plan.starts[piece]), int(self.plan.lengths[piece])
            # If the document continues after this piece, the piece's last token has a target too.
            follows = int(self.plan.goes_on[piece])
            tokens, scored = self.data.read(start, start + length + follows)
            sequences.inputs[at, column : column + length] = tokens[:length]
            sequences.targets[at, column : column + length - 1 + follows] = _targets(tokens, scored)
            if sequences.documents is not None:
                sequences.documents[at, column : column + length] = number
            column += length
        if sequences.documents is not None:
            sequences.documents[at, column:] = last - first


def _targets(tokens: np.ndarray, scored: np.ndarray | None) -> np.ndarray:
    following = tokens[1:].astype(np.int64)
    return following if scored is None else np.where(scored[1:], following, IGNORE)


@dataclass(frozen=True)
class Plan:
    """Assigns pieces of the token array to sequences.

    starts, lengths, goes_on [num_pieces], sequence by sequence; sequence_starts [num_sequences + 1]: the index of each
    sequence's first piece. A piece `goes_on` if its document continues after it.
    """

    starts: np.ndarray
    lengths: np.ndarray
    goes_on: np.ndarray
    sequence_starts: np.ndarray
    report: dict[str, int]


def build_sequences(data: TokenData, config: DataConfig) -> StreamSequences | PlannedSequences:
    """The sequences of `data`, packed according to `config`; a plan is saved beside the shards if possible."""
    mode, length = config.packing.mode, config.sequence_length
    if mode == "stream":
        return StreamSequences(data, length, config.packing.isolate)
    folder = data.folder / f"packing-{VERSION}-{data.side}-{mode}-{config.packing.too_long}-{length}"
    if folder.is_dir():
        return PlannedSequences(data, _load(folder))
    plan = make_plan(data.document_ends, length, mode, config.packing.too_long, data.any_scored)
    with contextlib.suppress(OSError):  # the cache may be read-only, if someone else prepared it
        _save(plan, folder)
    return PlannedSequences(data, plan)


def make_plan(
    ends: np.ndarray,
    capacity: int,
    mode: Literal["documents", "pairs", "none"],
    too_long: TooLong,
    any_scored: Callable[[int, int], bool],
) -> Plan:
    """Pack documents, given by their ends, into sequences of `capacity` tokens; `any_scored(start, stop)` tells whether
    any of those tokens is scored.

    The report counts sequences, padding, documents, documents or pairs that are too long (`too_long`), and tokens that
    are in no sequence (`lost_tokens`).
    """
    begins = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    together = 2 if mode == "pairs" else 1
    shorten = _pair_pieces if mode == "pairs" else _pieces
    starts, lengths, goes_on = shorten(begins, ends, capacity, too_long)
    # Whole documents are kept, scored or not, so that the sequences do not depend on the loss mask.
    is_part = goes_on | ~np.isin(starts, begins)
    teaches = np.ones(len(starts), dtype=bool)
    for piece in np.flatnonzero(is_part).tolist():
        first, last = int(starts[piece]), int(starts[piece] + lengths[piece] + goes_on[piece])
        teaches[piece] = any_scored(first + 1, last)
    # A pair is useless if one of its answers is lost.
    teaches = np.repeat(teaches.reshape(-1, together).all(axis=1), together)
    starts, lengths, goes_on = starts[teaches], lengths[teaches], goes_on[teaches]
    sizes = lengths.reshape(-1, together).sum(axis=1)
    sequence_of = np.repeat(np.arange(len(sizes)) if mode == "none" else best_fit(sizes, capacity), together)
    order = np.argsort(sequence_of, kind="stable")
    num_sequences = int(sequence_of.max()) + 1 if len(sequence_of) else 0
    sequence_starts = np.concatenate([[0], np.cumsum(np.bincount(sequence_of, minlength=num_sequences))]).astype(
        np.int64
    )
    # The token after a piece that goes on is a target of that piece. Count it as kept if it is not another piece's
    # input.
    targets_only = goes_on & ~np.isin(starts + lengths, starts)
    report = {
        "sequences": num_sequences,
        "padding": int(num_sequences * capacity - lengths.sum()),
        "documents": len(ends),
        "too_long": int(((ends - begins).reshape(-1, together).sum(axis=1) > capacity).sum()),
        "lost_tokens": int((ends - begins).sum() - lengths.sum() - targets_only.sum()),
    }
    return Plan(starts[order], lengths[order].astype(np.int32), goes_on[order], sequence_starts, report)


def _pieces(
    begins: np.ndarray, ends: np.ndarray, capacity: int, too_long: TooLong
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, length and goes_on of each document's pieces, none longer than `capacity`."""
    if too_long == "drop":
        fits = ends - begins <= capacity
        begins, ends = begins[fits], ends[fits]
        return begins, ends - begins, np.zeros(len(begins), dtype=bool)
    if too_long == "cut":
        stops = np.minimum(ends, begins + capacity)
        return begins, stops - begins, stops < ends
    # A document of capacity + 1 tokens needs only one sequence: its last token is a target but not an input.
    counts = np.maximum(1, -(-(ends - begins - 1) // capacity))
    document = np.repeat(np.arange(len(begins)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = begins[document] + number * capacity
    stops = np.minimum(starts + capacity, ends[document])
    return starts, stops - starts, stops < ends[document]


def _pair_pieces(
    begins: np.ndarray, ends: np.ndarray, capacity: int, too_long: TooLong
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same for pairs of documents, which stay together: both pieces together fit into `capacity`."""
    assert too_long != "split", "the configuration rules this out"
    lengths = (ends - begins).reshape(-1, 2)  # [num_pairs, 2]
    if too_long == "drop":
        fits = np.repeat(lengths.sum(axis=1) <= capacity, 2)
        begins, ends = begins[fits], ends[fits]
        return begins, ends - begins, np.zeros(len(begins), dtype=bool)
    # Each side gets half of the sequence, plus what the other side leaves of its half.
    first = np.minimum(lengths[:, 0], np.maximum(capacity // 2, capacity - lengths[:, 1]))
    second = np.minimum(lengths[:, 1], capacity - first)
    kept = np.stack([first, second], axis=1).reshape(-1)
    return begins, kept, kept < ends - begins


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing: assign each piece, longest first, to the sequence where it leaves the least room. Returns
    the sequence of each piece.

    It processes all pieces of one length, and all sequences with the same room, at once, so that a million documents
    take seconds. Sequences are numbered by their first piece, which roughly keeps the order of the documents.
    """
    order = np.argsort(-lengths, kind="stable")
    by_length = lengths[order]
    sequence_of = np.empty(len(lengths), dtype=np.int64)
    open_sequences: dict[int, list[np.ndarray]] = {}  # room -> sequences with that much room
    rooms = 0  # bit r is set if there are sequences with room r; the lowest bit from `length` on is the best fit
    num_sequences = at = 0
    while at < len(order):
        length = int(by_length[at])
        stop = int(np.searchsorted(-by_length, -length, side="right"))
        while at < stop:
            left = stop - at
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                sequences = open_sequences[room].pop()
                if not open_sequences[room]:
                    rooms &= ~(1 << room)
            else:
                room = capacity
                sequences = np.arange(num_sequences, num_sequences + -(-left // (capacity // length)))
                num_sequences += len(sequences)
            # Best fit fills one sequence before it continues with the next of the same room.
            each = room // length
            needed = -(-left // each)
            sequences, spare = sequences[:needed], sequences[needed:]
            placed = min(left, len(sequences) * each)
            sequence_of[order[at : at + placed]] = np.repeat(sequences, each)[:placed]
            at += placed
            last = placed - (len(sequences) - 1) * each
            for group, remaining in (
                (sequences[:-1], room - each * length),
                (sequences[-1:], room - last * length),
                (spare, room),
            ):
                if len(group) and remaining:
                    open_sequences.setdefault(remaining, []).append(group)
                    rooms |= 1 << remaining
    return _renumbered(sequence_of, num_sequences)


def _renumbered(sequence_of: np.ndarray, num_sequences: int) -> np.ndarray:
    first = np.full(num_sequences, len(sequence_of), dtype=np.int64)
    np.minimum.at(first, sequence_of, np.arange(len(sequence_of)))
    ranks = np.empty(num_sequences, dtype=np.int64)
    ranks[np.argsort(first, kind="stable")] = np.arange(num_sequences)
    return ranks[sequence_of]


_ARRAYS = ("starts", "lengths", "goes_on", "sequence_starts")


def _save(plan: Plan, folder: Path) -> None:
    with atomic_folder(folder) as temporary:
        for name in _ARRAYS:
            np.save(temporary / f"{name}.npy", getattr(plan, name))
        write_json(temporary / "report.json", plan.report)


def _load(folder: Path) -> Plan:
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
    return Plan(
        **{name: np.asarray(array) for name, array in arrays.items()},
        report=json.loads((folder / "report.json").read_text()),
    )
