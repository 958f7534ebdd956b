"""How documents are laid into rows of `sequence_length` tokens.

stream      documents joined and cut anywhere: row i reads T + 1 tokens, and its last target is row i + 1's first input.
documents   whole documents side by side, best fit; what is left of a row is padding.
pairs       the same with two documents at a time: those numbered 2 k and 2 k + 1 of a row are a pair.
none        one document a row, padded.

Of a document that is longer than a row, the last two keep the start, spread it over rows, or leave it out. A cut answer
has no end-of-document token to learn; a piece of a long document in which nothing is scored is left out.

A row's targets are the tokens that follow its inputs, where they are scored, else IGNORE. The first token of a document
is predicted from nothing: it is a target only in an unisolated stream.
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

VERSION = 2
"""Raise when the same documents would be laid out otherwise: plans are addressed by it."""

TooLong = Literal["cut", "split", "drop"]


@dataclass(frozen=True)
class Rows:
    """Rows to fill in place, as Batch has them: inputs [B, T], targets [B, T], documents [B, T] or None, reference
    [B, P, 2] or None. They arrive as padding: EOS as input, IGNORE as target."""

    inputs: np.ndarray
    targets: np.ndarray
    documents: np.ndarray | None
    reference: np.ndarray | None = None


class StreamRows:
    """Documents joined and cut every `sequence_length` tokens; only the last row can be padded."""

    def __init__(self, data: TokenData, sequence_length: int, isolate: bool) -> None:
        self.data, self.length = data, sequence_length
        # The last token is a target only; a row of it alone would have nothing to predict.
        self.num_rows = max(0, -(-(data.num_tokens - 1) // sequence_length))
        self._ends = data.document_ends if isolate else None
        padding = self.num_rows * sequence_length - max(0, data.num_tokens - 1)
        self.report = {"rows": self.num_rows, "padding": padding, "too_long": 0, "lost_tokens": 0}

    def fill(self, row: int, rows: Rows, at: int) -> None:
        """Write row `row` of the data into `rows` at `at`."""
        start = row * self.length
        stop = min(start + self.length + 1, self.data.num_tokens)
        tokens, scored = self.data.read(start, stop)
        used = stop - start - 1
        rows.inputs[at, :used] = tokens[:-1]
        rows.targets[at, :used] = _targets(tokens, scored)
        if rows.documents is None or self._ends is None:
            return
        # Ends inside (start, start + used]: an end at e means that token e begins another document.
        first, last = np.searchsorted(self._ends, [start, start + used], side="right")
        ends = self._ends[first:last] - start
        rows.targets[at, ends[ends <= used] - 1] = IGNORE
        begins = np.zeros(self.length, dtype=np.int32)
        begins[ends[ends < self.length]] = 1
        if used < self.length:
            begins[used] = 1
        rows.documents[at] = np.cumsum(begins)


class PlannedRows:
    """Pieces of documents as a plan lays them out."""

    def __init__(self, data: TokenData, plan: Plan) -> None:
        self.data, self.plan = data, plan
        self.num_rows = len(plan.row_starts) - 1
        self.report = plan.report

    def fill(self, row: int, rows: Rows, at: int) -> None:
        """Write row `row` of the data into `rows` at `at`."""
        first, last = self.plan.row_starts[row], self.plan.row_starts[row + 1]
        column = 0
        for number, piece in enumerate(range(first, last)):
            start, length = int(self.plan.starts[piece]), int(self.plan.lengths[piece])
            # A piece that its document goes on after has a target for its last token too.
            follows = int(self.plan.goes_on[piece])
            tokens, scored = self.data.read(start, start + length + follows)
            rows.inputs[at, column : column + length] = tokens[:length]
            rows.targets[at, column : column + length - 1 + follows] = _targets(tokens, scored)
            if rows.documents is not None:
                rows.documents[at, column : column + length] = number
            column += length
        if rows.documents is not None:
            rows.documents[at, column:] = last - first


def _targets(tokens: np.ndarray, scored: np.ndarray | None) -> np.ndarray:
    following = tokens[1:].astype(np.int64)
    return following if scored is None else np.where(scored[1:], following, IGNORE)


@dataclass(frozen=True)
class Plan:
    """Which piece of the token array lies in which row.

    starts, lengths, goes_on [num_pieces], row by row; row_starts [num_rows + 1]: where each row's pieces begin. A piece
    `goes_on` when its document does after it.
    """

    starts: np.ndarray
    lengths: np.ndarray
    goes_on: np.ndarray
    row_starts: np.ndarray
    report: dict[str, int]


def build_rows(data: TokenData, config: DataConfig) -> StreamRows | PlannedRows:
    """The rows of `data` as `config` packs them; a plan is kept beside the shards where that can be written."""
    mode, length = config.packing.mode, config.sequence_length
    if mode == "stream":
        return StreamRows(data, length, config.packing.isolate)
    folder = data.folder / f"packing-{VERSION}-{data.side}-{mode}-{config.packing.too_long}-{length}"
    if folder.is_dir():
        return PlannedRows(data, _load(folder))
    plan = make_plan(data.document_ends, length, mode, config.packing.too_long, data.any_scored)
    with contextlib.suppress(OSError):  # a cache that someone else prepared for us may be read-only
        _save(plan, folder)
    return PlannedRows(data, plan)


def make_plan(
    ends: np.ndarray,
    capacity: int,
    mode: Literal["documents", "pairs", "none"],
    too_long: TooLong,
    any_scored: Callable[[int, int], bool],
) -> Plan:
    """Lay documents, given by where each ends, into rows of `capacity` tokens; `any_scored(start, stop)` says whether
    any of those tokens is scored.

    The report counts rows, padding, documents, those (or the pairs) that are longer than a row (`too_long`), and the
    tokens that no row has (`lost_tokens`).
    """
    begins = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    together = 2 if mode == "pairs" else 1
    shorten = _pair_pieces if mode == "pairs" else _pieces
    starts, lengths, goes_on = shorten(begins, ends, capacity, too_long)
    # Whole documents stay, scored or not: which rows there are shall not depend on what is scored.
    is_part = goes_on | ~np.isin(starts, begins)
    teaches = np.ones(len(starts), dtype=bool)
    for piece in np.flatnonzero(is_part).tolist():
        first, last = int(starts[piece]), int(starts[piece] + lengths[piece] + goes_on[piece])
        teaches[piece] = any_scored(first + 1, last)
    # A pair of which one answer is lost says nothing.
    teaches = np.repeat(teaches.reshape(-1, together).all(axis=1), together)
    starts, lengths, goes_on = starts[teaches], lengths[teaches], goes_on[teaches]
    sizes = lengths.reshape(-1, together).sum(axis=1)
    row_of = np.repeat(np.arange(len(sizes)) if mode == "none" else best_fit(sizes, capacity), together)
    order = np.argsort(row_of, kind="stable")
    num_rows = int(row_of.max()) + 1 if len(row_of) else 0
    row_starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=num_rows))]).astype(np.int64)
    # A token after a piece is a target of it; it is another piece's first input, too, or it is in no other.
    targets_only = goes_on & ~np.isin(starts + lengths, starts)
    report = {
        "rows": num_rows,
        "padding": int(num_rows * capacity - lengths.sum()),
        "documents": len(ends),
        "too_long": int(((ends - begins).reshape(-1, together).sum(axis=1) > capacity).sum()),
        "lost_tokens": int((ends - begins).sum() - lengths.sum() - targets_only.sum()),
    }
    return Plan(starts[order], lengths[order].astype(np.int32), goes_on[order], row_starts, report)


def _pieces(
    begins: np.ndarray, ends: np.ndarray, capacity: int, too_long: TooLong
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, length and goes_on of what is left of each document, none longer than `capacity`."""
    if too_long == "drop":
        fits = ends - begins <= capacity
        begins, ends = begins[fits], ends[fits]
        return begins, ends - begins, np.zeros(len(begins), dtype=bool)
    if too_long == "cut":
        stops = np.minimum(ends, begins + capacity)
        return begins, stops - begins, stops < ends
    # A document of capacity + 1 needs one row only: its last token is a target, and no input.
    counts = np.maximum(1, -(-(ends - begins - 1) // capacity))
    document = np.repeat(np.arange(len(begins)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = begins[document] + number * capacity
    stops = np.minimum(starts + capacity, ends[document])
    return starts, stops - starts, stops < ends[document]


def _pair_pieces(
    begins: np.ndarray, ends: np.ndarray, capacity: int, too_long: TooLong
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same for pairs of documents that may not be parted: what is left of both together fits."""
    assert too_long != "split", "the configuration sees to it"
    lengths = (ends - begins).reshape(-1, 2)  # [num_pairs, 2]
    if too_long == "drop":
        fits = np.repeat(lengths.sum(axis=1) <= capacity, 2)
        begins, ends = begins[fits], ends[fits]
        return begins, ends - begins, np.zeros(len(begins), dtype=bool)
    # Each side has half of the row, and what the other leaves of its half.
    first = np.minimum(lengths[:, 0], np.maximum(capacity // 2, capacity - lengths[:, 1]))
    second = np.minimum(lengths[:, 1], capacity - first)
    kept = np.stack([first, second], axis=1).reshape(-1)
    return begins, kept, kept < ends - begins


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece: longest first, each into the row that it leaves the least room in.

    Works on all pieces of a length and all rows with the same room at once, so a million documents take seconds. Rows
    are numbered by their first piece, so the order of the documents survives roughly.
    """
    order = np.argsort(-lengths, kind="stable")
    by_length = lengths[order]
    row_of = np.empty(len(lengths), dtype=np.int64)
    open_rows: dict[int, list[np.ndarray]] = {}  # room -> rows that have it
    rooms = 0  # bit r is set where open_rows[r] has rows
    num_rows = at = 0
    while at < len(order):
        length = int(by_length[at])
        stop = int(np.searchsorted(-by_length, -length, side="right"))
        while at < stop:
            left = stop - at
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                rows = open_rows[room].pop()
                if not open_rows[room]:
                    rooms &= ~(1 << room)
            else:
                room = capacity
                rows = np.arange(num_rows, num_rows + -(-left // (capacity // length)))
                num_rows += len(rows)
            # Best fit fills one row up before it turns to the next of the same room.
            each = room // length
            needed = -(-left // each)
            rows, spare = rows[:needed], rows[needed:]
            placed = min(left, len(rows) * each)
            row_of[order[at : at + placed]] = np.repeat(rows, each)[:placed]
            at += placed
            last = placed - (len(rows) - 1) * each
            for group, remaining in (
                (rows[:-1], room - each * length),
                (rows[-1:], room - last * length),
                (spare, room),
            ):
                if len(group) and remaining:
                    open_rows.setdefault(remaining, []).append(group)
                    rooms |= 1 << remaining
    return _renumbered(row_of, num_rows)


def _renumbered(row_of: np.ndarray, num_rows: int) -> np.ndarray:
    first = np.full(num_rows, len(row_of), dtype=np.int64)
    np.minimum.at(first, row_of, np.arange(len(row_of)))
    ranks = np.empty(num_rows, dtype=np.int64)
    ranks[np.argsort(first, kind="stable")] = np.arange(num_rows)
    return ranks[row_of]


_ARRAYS = ("starts", "lengths", "goes_on", "row_starts")


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
