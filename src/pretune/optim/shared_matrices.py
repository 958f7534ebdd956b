"""Matrices that several processes orthogonalize together: each takes whole ones, and all get what they need of the
results.

Where each process has the whole model, the results are gathered. Where it has rows of every matrix, the rows travel to
the process that takes the matrix, and those of the result travel back: two exchanges for all matrices of a step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

Orthogonalize = Callable[[Sequence[Tensor]], list[Tensor]]
"""Makes of matrices [M, N] others of the same shapes; returns them in one dtype."""


@dataclass(frozen=True)
class Piece:
    """A matrix to be orthogonalized: all or some of the rows of a parameter.

    first, rows: which of the parameter's rows it is. height: how many the parameter has.
    """

    first: int
    rows: int
    columns: int
    height: int

    def of(self, rank: int, count: int) -> tuple[int, int]:
        """The rows of the parameter that are both in the piece and with process `rank` of `count`, as (start, stop);
        torch's Shard(0) gives each process but the last ones equally many."""
        share = -(-self.height // count)
        start = min(max(self.first, rank * share), self.first + self.rows)
        stop = max(min(self.first + self.rows, (rank + 1) * share), start)
        return start, stop

    def num_rows(self, rank: int, count: int) -> int:
        start, stop = self.of(rank, count)
        return stop - start


class Processes(ABC):
    """The processes that orthogonalize matrices together."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group, self.rank, self.count = group, dist.get_rank(group), dist.get_world_size(group)

    @abstractmethod
    def orthogonalized(
        self, pieces: Sequence[Piece], own: Sequence[Tensor], dtype: torch.dtype, orthogonalize: Orthogonalize
    ) -> list[Tensor]:
        """What this process needs of the results for `pieces`, in `dtype`. `own`: its rows of each of them; it returns
        as many."""

    def mine(self, pieces: Sequence[Piece]) -> list[list[int]]:
        """The indices of the pieces that each process takes: the largest first, each to the one with the least work."""
        work, taken = [0] * self.count, list[list[int]](list[int]() for _ in range(self.count))
        for index in sorted(range(len(pieces)), key=lambda index: -_work(pieces[index])):
            least = min(range(self.count), key=work.__getitem__)
            work[least] += _work(pieces[index])
            taken[least].append(index)
        return taken


class WithWholeMatrices(Processes):
    """Processes of which each has all matrices."""

    def orthogonalized(
        self, pieces: Sequence[Piece], own: Sequence[Tensor], dtype: torch.dtype, orthogonalize: Orthogonalize
    ) -> list[Tensor]:
        taken = self.mine(pieces)
        done = orthogonalize([own[index] for index in taken[self.rank]])
        longest = max(sum(own[index].numel() for index in indices) for indices in taken)
        sent = own[0].new_zeros(longest, dtype=dtype)
        sent[: sum(map(torch.numel, done))] = _flat(done, sent)
        received = [torch.empty_like(sent) for _ in range(self.count)]
        dist.all_gather(received, sent, group=self.group)
        results: dict[int, Tensor] = {}
        for indices, part in zip(taken, received, strict=True):
            shapes = [(pieces[index].rows, pieces[index].columns) for index in indices]
            results |= dict(zip(indices, _apart(part, shapes), strict=True))
        return [results[index] for index in range(len(pieces))]


class WithRows(Processes):
    """Processes of which each has some rows of every matrix."""

    def orthogonalized(
        self, pieces: Sequence[Piece], own: Sequence[Tensor], dtype: torch.dtype, orthogonalize: Orthogonalize
    ) -> list[Tensor]:
        taken, ranks = self.mine(pieces), range(self.count)
        mine = taken[self.rank]

        def shapes(indices: Sequence[int], rank: int) -> list[tuple[int, int]]:
            return [(pieces[index].num_rows(rank, self.count), pieces[index].columns) for index in indices]

        there = [shapes(mine, rank) for rank in ranks]  # of my matrices, the rows of each process
        here = [shapes(indices, self.rank) for indices in taken]  # of each process's matrices, my rows
        # What is too large for float16 fits once it is scaled, which takes the whole matrix.
        wide = own[0].new_empty(0, dtype=torch.float32 if dtype == torch.float16 else dtype)
        received = self._exchange([[own[index] for index in indices] for indices in taken], there, wide)
        done = orthogonalize([torch.cat(rows) for rows in zip(*received, strict=True)])
        split = [one.split([part[at][0] for part in there]) for at, one in enumerate(done)]
        back = self._exchange([[rows[rank] for rows in split] for rank in ranks], here, wide.to(dtype))
        results: dict[int, Tensor] = {}
        for indices, rows in zip(taken, back, strict=True):
            results |= dict(zip(indices, rows, strict=True))
        return [results[index] for index in range(len(pieces))]

    def _exchange(
        self, sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[tuple[int, int]]], like: Tensor
    ) -> list[list[Tensor]]:
        """Send a list of matrices to each process, and get one from each, of these shapes, in the dtype of `like`."""
        sizes = [sum(rows * columns for rows, columns in one) for one in shapes]
        incoming, outgoing = like.new_empty(sum(sizes)), torch.cat([_flat(one, like) for one in sent])
        dist.all_to_all_single(
            incoming, outgoing, sizes, [sum(map(torch.numel, one)) for one in sent], group=self.group
        )
        return [_apart(part, one) for part, one in zip(incoming.split(sizes), shapes, strict=True)]

    def sums(self, values: Tensor) -> Tensor:
        """The sums of `values` over the processes."""
        dist.all_reduce(values, group=self.group)
        return values


def _work(piece: Piece) -> int:
    """The multiplications of an iteration, up to a factor."""
    return piece.rows * piece.columns * min(piece.rows, piece.columns)


def _flat(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """All values in a row, in the dtype of `like`."""
    return torch.cat([like.new_empty(0), *(one.reshape(-1).to(like.dtype) for one in tensors)])


def _apart(flat: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The matrices of these shapes that follow one another in `flat`; what is left over is padding."""
    parts = flat.split([*(sizes := [rows * columns for rows, columns in shapes]), len(flat) - sum(sizes)])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=False)]
