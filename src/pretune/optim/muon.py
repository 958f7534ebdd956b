"""Muon with what torch's has no place for: matrices of a shape at once, fused ones apart, normalised neurons, cautious
weight decay."""

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
    """torch's Muon, up to the rounding of bfloat16, for the parameters of `trained`.

    Matrices of the same shape are orthogonalized together, which spares most of the time of small ones; a parameter
    that holds several (queries, keys and values) is orthogonalized and scaled piece by piece. Sharded parameters
    (DTensor) are taken one by one and whole.

    neuron_beta: after the orthogonalization each row of a matrix, the weights of one neuron, is divided by the root of
    its running mean square, and the whole put back to the norm it had (NorMuon, arXiv:2510.05491; there the norm is
    set to 0.2 sqrt(rows * columns), which is what the update has here with `adjust_lr_fn` match_rms_adamw, up to how
    far the orthogonalization is from exact). cautious_decay: weights are decayed only where the update has their own
    sign, and so takes them nearer to zero too (arXiv:2510.12402).
    """

    def __init__(
        self,
        params: Any,
        trained: Sequence[Trained],
        *,
        neuron_beta: float | None,
        cautious_decay: bool,
        **settings: Any,
    ) -> None:
        super().__init__(params, **settings)
        self.neuron_beta, self.cautious_decay = neuron_beta, cautious_decay
        self.rows: Mapping[Tensor, tuple[int, ...]] = {one.parameter: one.rows for one in trained}
        """Of each parameter, the rows of the matrices in it."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update every parameter that has a gradient."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            pieces = [piece for weight in weights for piece in self._split(weight, self._direction(weight, group))]
            updates = iter(orthogonalize(pieces, group["ns_coefficients"], group["ns_steps"], group["eps"]))
            for weight in weights:
                self._update(weight, [next(updates) for _ in self._split(weight, weight)], group)

    def _split(self, weight: Tensor, tensor: Tensor) -> Sequence[Tensor]:
        """The matrices in `tensor`, which is as large as `weight`."""
        return [tensor] if isinstance(tensor, DTensor) else tensor.split(self.rows[weight])

    def _direction(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        """The running gradient [M, N], one step ahead where it is Nesterov's."""
        state, momentum = self.state[weight], group["momentum"]
        assert weight.grad is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight.grad)
            if self.neuron_beta is not None:
                state["neuron_square"] = torch.zeros_like(weight.grad[:, :1], dtype=torch.float32)
        average = state["momentum_buffer"]
        average.lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(average, momentum) if group["nesterov"] else average

    def _update(self, weight: Tensor, updates: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Move the matrices in `weight` against their orthogonalized directions."""
        if self.neuron_beta is not None:
            squares = self._split(weight, self.state[weight]["neuron_square"])
            updates = [
                _normalize(update.float(), square, self.neuron_beta, group["eps"])
                for update, square in zip(updates, squares, strict=True)
            ]
        decay = group["lr"] * group["weight_decay"]
        for matrix, update in zip(self._split(weight, weight), updates, strict=True):
            if self.cautious_decay:
                matrix.sub_(matrix * (matrix * update >= 0), alpha=decay)
            elif decay:
                matrix.mul_(1 - decay)
            matrix.add_(update, alpha=-group["lr"] * _scale(group["adjust_lr_fn"], *matrix.shape))


def orthogonalize(
    matrices: Sequence[Tensor], coefficients: tuple[float, float, float], steps: int, eps: float
) -> list[Tensor]:
    """Matrices [M, N] with their singular values brought near 1, in bfloat16, by Newton-Schulz iterations of degree 5
    (kellerjordan.github.io/posts/muon; torch.optim.Muon's own is private and takes one at a time)."""
    flat = [(matrix.T if matrix.size(0) > matrix.size(1) else matrix).bfloat16() for matrix in matrices]
    alike: dict[object, list[int]] = defaultdict(list)
    for index, matrix in enumerate(flat):
        alike[index if isinstance(matrix, DTensor) else matrix.shape].append(index)
    for indices in alike.values():
        if len(indices) == 1:
            flat[indices[0]] = _iterate(flat[indices[0]], coefficients, steps, eps)
        else:
            together = _iterate(torch.stack([flat[index] for index in indices]), coefficients, steps, eps)
            for index, matrix in zip(indices, together.unbind(), strict=True):
                flat[index] = matrix
    return [x.T if matrix.size(0) > matrix.size(1) else x for x, matrix in zip(flat, matrices, strict=True)]


def _iterate(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton-Schulz on x [M, N] or [K, M, N], M at most N."""
    a, b, c = coefficients
    multiply_add = torch.addmm if x.ndim == 2 else torch.baddbmm
    norm = x.norm() if x.ndim == 2 else x.norm(dim=(-2, -1), keepdim=True)
    x = x / norm.clamp(min=eps)  # no singular value is above 1
    for _ in range(steps):
        gram = x @ x.mT
        x = multiply_add(x, multiply_add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _normalize(update: Tensor, square: Tensor, beta: float, eps: float) -> Tensor:
    """`update` [M, N] with rows divided by the root of their running mean `square` [M, 1], at the norm it had."""
    square.lerp_(update.square().mean(-1, keepdim=True), 1 - beta)
    rows = update / (square.sqrt() + eps)
    return rows * (update.norm() / rows.norm().clamp(min=eps))


def _scale(adjustment: str, rows: int, columns: int) -> float:
    if adjustment == "match_rms_adamw":  # arXiv:2502.16982
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))
