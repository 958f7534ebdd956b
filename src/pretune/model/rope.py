"""Rotary positions (arXiv 2104.09864), real-valued, in the half-split layout of Hugging Face's Llama.

B rows, T tokens, H heads, K head width, R rotated width (R <= K, even).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pretune.model.config import LinearScaling, Llama3Scaling, RopeConfig, RopeScaling


class Rope(nn.Module):
    """Table of cosines and sines for every position up to max_sequence_length."""

    table: Tensor

    def __init__(self, config: RopeConfig, head_dim: int, max_sequence_length: int) -> None:
        super().__init__()
        self.config, self.max_sequence_length = config, max_sequence_length
        self.rotary_dim = int(head_dim * config.fraction) // 2 * 2
        self.register_buffer("table", self._make_table(), persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        """Cosines and sines of integer positions [...] as one float32 tensor [2, ..., R/2]."""
        return self.table[:, positions]

    def first(self, length: int) -> Tensor:
        """The same for positions 0 to `length`: [2, length, R/2], without a gather."""
        return self.table[:, :length]

    def _make_table(self) -> Tensor:
        # float64 throughout: in float32 the angle of position 100,000 is already off by 0.006 radians. Computed on
        # torch's default device, the CPU, because MPS has no float64.
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.float64) / max(self.rotary_dim, 1)
        positions = torch.arange(self.max_sequence_length, dtype=torch.float64)
        frequencies = stretched(self.config.theta**-exponents, self.config.scaling)  # [R/2]
        angles = torch.outer(positions, frequencies)  # [positions, R/2]
        return torch.stack((angles.cos(), angles.sin())).float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rope:
        # Only the device follows the module. Converted to bf16, 512 positions would have 385 distinct angles;
        # materialized from the meta device, the table would be uninitialized memory.
        self.table = self._make_table().to(fn(self.table).device)
        return self


def stretched(frequencies: Tensor, scaling: RopeScaling | None) -> Tensor:
    """Frequencies [R/2], in radians per position, of a model stretched to more positions.

    Source of llama3: meta-llama/llama-models, models/llama3/model.py, apply_scaling.
    """
    match scaling:
        case None:
            return frequencies
        case LinearScaling():
            return frequencies / scaling.factor
        case Llama3Scaling():
            turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: divided, 1: kept
            return frequencies * (kept + (1 - kept) / scaling.factor)


def rotate(heads: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the first R components of each head, in float32; the result has the dtype of `heads`.

    heads [B, T, H, K]; cos_sin [2, T, R/2], or [2, B, T, R/2] if positions differ between rows.
    """
    cos, sin = cos_sin.unsqueeze(-2)  # [(B,) T, 1, R/2]
    half = cos.shape[-1]
    if half == 0:
        return heads
    first, second, rest = heads.split([half, half, heads.shape[-1] - 2 * half], dim=-1)
    first, second = first.float(), second.float()
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*(part.to(heads.dtype) for part in turned), rest), dim=-1)
