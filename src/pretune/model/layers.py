"""Norms and the feed-forward network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretune.model.config import GATED, Activation, ModelConfig, NormConfig


class Norm(nn.Module):
    """rmsnorm (arXiv 1910.07467) or layernorm over the last axis, computed in float32 and returned in x's dtype."""

    def __init__(self, dim: int, config: NormConfig) -> None:
        super().__init__()
        self.kind, self.shape, self.eps, self.offset = config.kind, (dim,), config.eps, config.offset
        self.weight = nn.Parameter(torch.full((dim,), 1.0 - config.offset)) if config.learned else None
        self.bias = nn.Parameter(torch.zeros(dim)) if config.learned and config.kind == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.scale()
        if self.kind == "rmsnorm":
            return F.rms_norm(x.float(), self.shape, weight, self.eps).to(x.dtype)
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.shape, weight, bias, self.eps).to(x.dtype)

    def scale(self) -> Tensor | None:
        """What the normalized values are multiplied by, in float32: [D]; None for 1."""
        if self.weight is None:
            return None
        return self.weight.float() + self.offset if self.offset else self.weight.float()


class EmbeddingScale(nn.Module):
    """Multiplies by sqrt(dim), rounded to the type of what it multiplies (55.5 for 3072 in bfloat16), as Gemma does."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.factor = dim**0.5

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.full((), self.factor, dtype=x.dtype, device=x.device)


class MLP(nn.Module):
    """Feed-forward network: dim -> mlp_dim -> dim. For gated activations, one matrix holds gate and up, gate first."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation: Activation = config.activation
        if config.activation in GATED:
            self.gate_up = nn.Linear(config.dim, 2 * config.mlp_dim, bias=config.bias.mlp)
            # Optimizers that treat a matrix as a whole (Muon) must treat these as two.
            self.gate_up.rows = (config.mlp_dim, config.mlp_dim)  # type: ignore[assignment]
        else:
            self.up = nn.Linear(config.dim, config.mlp_dim, bias=config.bias.mlp)
        self.down = nn.Linear(config.mlp_dim, config.dim, bias=config.bias.mlp)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation in GATED:
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            return self.down(activate(gate, self.activation) * up)
        return self.down(activate(self.up(x), self.activation))


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The nonlinearity of an activation; for a gated one, the function applied to its gate (arXiv 2002.05202).

    gelu and geglu use the tanh approximation, as GPT-2 and Gemma do (`gelu_pytorch_tanh` in transformers).
    """
    match activation:
        case "swiglu" | "silu":
            return F.silu(x)
        case "geglu" | "gelu":
            return F.gelu(x, approximate="tanh")
        case "reglu" | "relu":
            return F.relu(x)
        case "relu_squared":
            return F.relu(x).square()
