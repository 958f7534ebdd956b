"""Muon with two changes that torch's has no place for: normalised neurons and cautious weight decay."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Muon


class NorMuon(Muon):
    """torch's Muon, the same to the last bit while `neuron_beta` is None and `cautious_decay` False.

    neuron_beta: after the orthogonalization each row of a matrix, the weights of one neuron, is divided by the root of
    its running mean square, and the whole put back to the norm it had (NorMuon, arXiv:2510.05491; there the norm is
    set to 0.2 sqrt(rows * columns), which is what the update has here with `adjust_lr_fn` match_rms_adamw, up to how
    far the orthogonalization is from exact). cautious_decay: weights are decayed only where the update has their own
    sign, and so takes them nearer to zero too (arXiv:2510.12402).
    """

    def __init__(self, params: Any, *, neuron_beta: float | None, cautious_decay: bool, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.neuron_beta, self.cautious_decay = neuron_beta, cautious_decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update every parameter that has a gradient."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, momentum = self.state[weight], group["momentum"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
            if self.neuron_beta is not None:
                state["neuron_square"] = torch.zeros_like(gradient[:, :1], dtype=torch.float32)
        average = state["momentum_buffer"]
        average.lerp_(gradient, 1 - momentum)
        ahead = gradient.lerp(average, momentum) if group["nesterov"] else average
        update = orthogonalize(ahead, group["ns_coefficients"], group["ns_steps"], group["eps"])
        if self.neuron_beta is not None:
            update = _normalize(update.float(), state["neuron_square"], self.neuron_beta, group["eps"])
        decay = group["lr"] * group["weight_decay"]
        if self.cautious_decay:
            weight.sub_(weight * (weight * update >= 0), alpha=decay)
        else:
            weight.mul_(1 - decay)
        weight.add_(update, alpha=-group["lr"] * _scale(group["adjust_lr_fn"], *weight.shape))


def orthogonalize(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """`matrix` [M, N] with its singular values brought near 1, in bfloat16, by Newton-Schulz iterations of degree 5
    (kellerjordan.github.io/posts/muon; torch.optim.Muon's own is private)."""
    a, b, c = coefficients
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.bfloat16()
    x = x.T if tall else x
    x = x / x.norm().clamp(min=eps)  # no singular value is above 1
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _normalize(update: Tensor, square: Tensor, beta: float, eps: float) -> Tensor:
    """`update` [M, N] with rows divided by the root of their running mean `square` [M, 1], at the norm it had."""
    square.lerp_(update.square().mean(-1, keepdim=True), 1 - beta)
    rows = update / (square.sqrt() + eps)
    return rows * (update.norm() / rows.norm().clamp(min=eps))


def _scale(adjustment: str, rows: int, columns: int) -> float:
    if adjustment == "match_rms_adamw":  # arXiv:2502.16982
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))
