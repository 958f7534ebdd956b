"""Muon with features that torch's lacks: batching of equal shapes, splitting of fused matrices, normalized neurons,
cautious weight decay, and processes that share the work out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Muon

from pretune.core.named_tensors import is_shared_out, local
from pretune.optim.groups import Trained
from pretune.optim.shared_matrices import Piece, Processes, WithRows, WithWholeMatrices


class BatchedMuon(Muon):
    """torch's Muon, up to rounding, for the parameters of `trained`; it orthogonalizes in `dtype` (torch's: bfloat16).

    Matrices of the same shape are orthogonalized in one batch, which saves most of the time for small ones. A parameter
    that fuses several matrices (queries, keys and values) is orthogonalized and scaled piece by piece.

    Several processes share the matrices out. Of parameters that they share out by rows (DTensor) and that have the same
    mesh, each process has the rows of momentum and weights that are its own; the update is that of the whole matrix.

    shared: whether there are several processes.

    neuron_beta: after the orthogonalization, each row of a matrix (the weights of one neuron) is divided by the root of
    its running mean square, and the matrix is rescaled to its previous norm (NorMuon, arXiv:2510.05491; the paper sets
    the norm to 0.2 sqrt(rows * columns), which the update has here with `adjust_lr_fn` match_rms_adamw, up to the error
    of the orthogonalization). cautious_decay: a weight is decayed only where the update has its sign, and so moves it
    towards zero too (arXiv:2510.12402).

    Like torch's fused optimizers it reads `found_inf`, a scalar on the device that the caller may set: if it is 1, a
    step changes nothing, and the host does not have to wait for its value.
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Any,
        trained: Sequence[Trained],
        *,
        dtype: torch.dtype,
        neuron_beta: float | None,
        cautious_decay: bool,
        shared: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(params, **settings)
        self.dtype, self.neuron_beta, self.cautious_decay = dtype, neuron_beta, cautious_decay
        self.rows: Mapping[Tensor, tuple[int, ...]] = {one.parameter: one.rows for one in trained}
        """The rows of the matrices in each parameter."""
        self.processes = _processes(trained[0].parameter) if shared else None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update every parameter that has a gradient."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            directions = [part for weight in weights for part in self._split(weight, self._direction(weight, group))]
            updates = iter(self._orthogonalized(weights, directions, group))
            found = {weight: [next(updates) for _ in self.rows[weight]] for weight in weights}
            if self.neuron_beta is not None:
                self._normalize(found, group)
            for weight in weights:
                self._update(weight, found[weight], group)

    def _orthogonalized(
        self, weights: Sequence[Tensor], directions: Sequence[Tensor], group: dict[str, Any]
    ) -> list[Tensor]:
        """What becomes of the matrices of `weights`: of this process's rows of them, `directions`."""

        def compute(matrices: Sequence[Tensor]) -> list[Tensor]:
            return orthogonalize(matrices, self.dtype, group["ns_coefficients"], group["ns_steps"], group["eps"])

        if self.processes is None or not weights:
            return compute(directions)
        pieces = [piece for weight in weights for piece in self._pieces(weight)]
        return self.processes.orthogonalized(pieces, directions, self.dtype, compute)

    def _pieces(self, weight: Tensor) -> list[Piece]:
        rows, (height, columns) = self.rows[weight], weight.shape
        return [Piece(sum(rows[:at]), rows[at], columns, height) for at in range(len(rows))]

    def _split(self, weight: Tensor, tensor: Tensor) -> Sequence[Tensor]:
        """This process's rows of each of the matrices in `tensor`, which is as high as `weight`; they are views."""
        if not isinstance(self.processes, WithRows):
            return tensor.split(self.rows[weight])
        rank, count = self.processes.rank, self.processes.count
        return local(tensor).split([piece.num_rows(rank, count) for piece in self._pieces(weight)])

    def _direction(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        """The running mean of the gradient [M, N], with Nesterov's look-ahead if it is on."""
        state, momentum = self.state[weight], group["momentum"]
        assert weight.grad is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight.grad)
            if self.neuron_beta is not None:
                state["neuron_square"] = torch.zeros_like(weight.grad[:, :1], dtype=torch.float32)
        average, gradient = local(state["momentum_buffer"]), local(weight.grad)
        average.lerp_(gradient, self._unless_skipped(1 - momentum))
        return gradient.lerp(average, momentum) if group["nesterov"] else average

    def _unless_skipped(self, amount: float) -> Any:
        """`amount`, or 0 if the step is skipped."""
        return amount if self.found_inf is None else amount * (1 - self.found_inf)

    def _normalize(self, updates: dict[Tensor, list[Tensor]], group: dict[str, Any]) -> None:
        """Divide the rows of each update [M, N] by the root of their running mean square, keeping the norm of the whole
        matrix."""
        eps, new = group["eps"], self._unless_skipped(1 - (self.neuron_beta or 0.0))
        flat = [update.float() for found in updates.values() for update in found]
        squares = [
            part for weight in updates for part in self._split(weight, self.state[weight]["neuron_square"])
        ]  # each [M, 1]
        for update, square in zip(flat, squares, strict=True):
            square.lerp_(update.square().mean(-1, keepdim=True), new)
        rows = [update / (square.sqrt() + eps) for update, square in zip(flat, squares, strict=True)]
        before, after = self._norms(flat), self._norms(rows)
        scaled = iter([one * (a / b.clamp(min=eps)) for one, a, b in zip(rows, before, after, strict=True)])
        for weight, found in updates.items():
            updates[weight] = [next(scaled) for _ in found]

    def _norms(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """The norms of whole matrices, of which this process may have some rows."""
        norms = [matrix.norm() for matrix in matrices]
        if not isinstance(self.processes, WithRows) or not norms:
            return norms
        return [*self.processes.sums(torch.stack(norms).square()).sqrt().unbind()]

    def _update(self, weight: Tensor, updates: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Decay the matrices in `weight` and subtract their orthogonalized updates."""
        lr, shapes = self._unless_skipped(group["lr"]), [(rows, weight.shape[1]) for rows in self.rows[weight]]
        for matrix, update, shape in zip(self._split(weight, weight), updates, shapes, strict=True):
            if self.cautious_decay:
                _subtract(matrix, matrix * (matrix * update >= 0), lr * group["weight_decay"])
            elif group["weight_decay"]:
                matrix.mul_(1 - lr * group["weight_decay"])
            _subtract(matrix, update, lr * _scale(group["adjust_lr_fn"], *shape))


def _processes(parameter: Any) -> Processes:
    """The processes that share out the matrices of a model with this parameter."""
    if not is_shared_out(parameter):
        return WithWholeMatrices()
    mesh, placements = parameter.device_mesh, parameter.placements
    return WithRows(mesh.get_group(next(at for at, one in enumerate(placements) if one.is_shard())))


def orthogonalize(
    matrices: Sequence[Tensor], dtype: torch.dtype, coefficients: tuple[float, float, float], steps: int, eps: float
) -> list[Tensor]:
    """Bring the singular values of matrices [M, N] near 1, in `dtype`, by Newton-Schulz iterations of degree 5
    (kellerjordan.github.io/posts/muon; torch.optim.Muon's version is private and takes one matrix at a time)."""
    # Tall matrices are transposed, so that the Gram matrix x @ x.T of each iteration has the smaller of the two sizes.
    flat = [_unit(matrix.T if matrix.size(0) > matrix.size(1) else matrix, dtype, eps) for matrix in matrices]
    alike: dict[torch.Size, list[int]] = defaultdict(list)
    for index, matrix in enumerate(flat):
        alike[matrix.shape].append(index)
    for indices in alike.values():
        if len(indices) == 1:
            flat[indices[0]] = _iterate(flat[indices[0]], coefficients, steps)
        else:
            together = _iterate(torch.stack([flat[index] for index in indices]), coefficients, steps)
            for index, matrix in zip(indices, together.unbind(), strict=True):
                flat[index] = matrix
    return [x.T if matrix.size(0) > matrix.size(1) else x for x, matrix in zip(flat, matrices, strict=True)]


def _unit(x: Tensor, dtype: torch.dtype, eps: float) -> Tensor:
    """x in `dtype`, scaled so that no singular value exceeds 1."""
    # As in torch, convert before scaling; except float16, which would overflow on large gradients and their squares.
    if dtype != torch.float16:
        x = x.to(dtype)
    return (x / x.norm().clamp(min=eps)).to(dtype)


def _iterate(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Newton-Schulz on x [M, N] or [K, M, N], M at most N."""
    a, b, c = coefficients
    multiply_add = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT
        x = multiply_add(x, multiply_add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _subtract(matrix: Tensor, update: Tensor, amount: Any) -> None:
    """matrix - amount * update, in place, in the matrix's dtype; `amount` is a number or a scalar tensor."""
    if isinstance(amount, Tensor):
        matrix.addcmul_(update.to(matrix.dtype), amount, value=-1)
    else:
        matrix.sub_(update, alpha=amount)


def _scale(adjustment: str, rows: int, columns: int) -> float:
    if adjustment == "match_rms_adamw":  # arXiv:2502.16982
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))
