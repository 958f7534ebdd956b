"""Muon with features that torch's lacks: batching of equal shapes, splitting of fused matrices, normalized neurons and
cautious weight decay."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Muon

from pretune.optim.groups import Trained


class BatchedMuon(Muon):
    """torch's Muon, up to rounding, for the parameters of `trained`; it orthogonalizes in `dtype` (torch's: bfloat16).

    Matrices of the same shape are orthogonalized in one batch, which saves most of the time for small ones. A parameter
    that fuses several matrices (queries, keys and values) is orthogonalized and scaled piece by piece. Sharded
    parameters (DTensor) are processed one by one, whole.

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
        **settings: Any,
    ) -> None:
        super().__init__(params, **settings)
        self.dtype, self.neuron_beta, self.cautious_decay = dtype, neuron_beta, cautious_decay
        self.rows: Mapping[Tensor, tuple[int, ...]] = {one.parameter: one.rows for one in trained}
        """The rows of the matrices in each parameter."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update every parameter that has a gradient."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            pieces = [piece for weight in weights for piece in self._split(weight, self._direction(weight, group))]
            updates = iter(orthogonalize(pieces, self.dtype, group["ns_coefficients"], group["ns_steps"], group["eps"]))
            for weight in weights:
                self._update(weight, [next(updates) for _ in self._split(weight, weight)], group)

    def _split(self, weight: Tensor, tensor: Tensor) -> Sequence[Tensor]:
        """The matrices in `tensor`, which has as many rows as `weight`."""
        return [tensor] if isinstance(tensor, DTensor) else tensor.split(self.rows[weight])

    def _direction(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        """The running mean of the gradient [M, N], with Nesterov's look-ahead if it is on."""
        state, momentum = self.state[weight], group["momentum"]
        assert weight.grad is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight.grad)
            if self.neuron_beta is not None:
                state["neuron_square"] = torch.zeros_like(weight.grad[:, :1], dtype=torch.float32)
        average = state["momentum_buffer"]
        average.lerp_(weight.grad, self._unless_skipped(1 - momentum))
        return weight.grad.lerp(average, momentum) if group["nesterov"] else average

    def _unless_skipped(self, amount: float) -> Any:
        """`amount`, or 0 if the step is skipped."""
        return amount if self.found_inf is None else amount * (1 - self.found_inf)

    def _update(self, weight: Tensor, updates: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Decay the matrices in `weight` and subtract their orthogonalized updates."""
        if self.neuron_beta is not None:
            squares = self._split(weight, self.state[weight]["neuron_square"])
            updates = [
                _normalize(update.float(), square, self._unless_skipped(1 - self.neuron_beta), group["eps"])
                for update, square in zip(updates, squares, strict=True)
            ]
        lr = self._unless_skipped(group["lr"])
        for matrix, update in zip(self._split(weight, weight), updates, strict=True):
            if self.cautious_decay:
                _subtract(matrix, matrix * (matrix * update >= 0), lr * group["weight_decay"])
            elif group["weight_decay"]:
                matrix.mul_(1 - lr * group["weight_decay"])
            _subtract(matrix, update, lr * _scale(group["adjust_lr_fn"], *matrix.shape))


def orthogonalize(
    matrices: Sequence[Tensor], dtype: torch.dtype, coefficients: tuple[float, float, float], steps: int, eps: float
) -> list[Tensor]:
    """Bring the singular values of matrices [M, N] near 1, in `dtype`, by Newton-Schulz iterations of degree 5
    (kellerjordan.github.io/posts/muon; torch.optim.Muon's version is private and takes one matrix at a time)."""
    # Tall matrices are transposed, so that the Gram matrix x @ x.T of each iteration has the smaller of the two sizes.
    flat = [_unit(matrix.T if matrix.size(0) > matrix.size(1) else matrix, dtype, eps) for matrix in matrices]
    alike: dict[object, list[int]] = defaultdict(list)
    for index, matrix in enumerate(flat):
        alike[index if isinstance(matrix, DTensor) else matrix.shape].append(index)
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


def _normalize(update: Tensor, square: Tensor, new: Any, eps: float) -> Tensor:
    """Divide the rows of `update` [M, N] by the root of their running mean `square` [M, 1], keeping the norm of the
    whole; `new` is the weight of this update in the running mean."""
    square.lerp_(update.square().mean(-1, keepdim=True), new)
    rows = update / (square.sqrt() + eps)
    return rows * (update.norm() / rows.norm().clamp(min=eps))


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
