"""Rotary positions (arXiv 2104.09864), real-valued, in the half-split layout of Hugging Face's Llama.

B rows, T tokens, H heads, K head width, R rotated width (R <= K, even).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pretune.model.rope_config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongropeScaling,
    NtkScaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)

_TURN = 2**42
"""A full turn in whole numbers: a position below 2^20 times a frequency below this fits into 64 bits."""


class Rope(nn.Module):
    """Cosines and sines of every position up to max_sequence_length.

    Where they do not depend on the length of the text, they are in a table: float32 [2, positions, R/2]. Else the table
    has frequencies, by the number of tokens that a text is longer than the original length: int64 [lengths, R/2], in
    parts of a turn. In whole numbers the angle of any position is exact, on devices without float64 too, and the length
    is a tensor, so that compiled code serves every length and nothing waits for a GPU.
    """

    table: Tensor

    def __init__(self, config: RopeConfig, head_dim: int, max_sequence_length: int) -> None:
        super().__init__()
        self.config, self.max_sequence_length = config, max_sequence_length
        self.rotary_dim = config.rotated(head_dim)
        self.register_buffer("table", self._make_table(), persistent=False)

    def forward(self, positions: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Cosines and sines, times the attention factor, of integer positions [..., T]: one float32 tensor
        [2, ..., T, R/2].

        lengths [..., T] or [..., 1]: the lengths of their texts, needed if config.follows_length.
        """
        scaling = self.config.scaling
        if not isinstance(scaling, DynamicScaling | LongropeScaling):
            return self.table[:, positions]
        assert lengths is not None, "the rotation depends on the length of the text"
        beyond = (lengths - scaling.original_max_position_embeddings).clamp(0, len(self.table) - 1)
        angles = (positions[..., None] * self.table[beyond] % _TURN).float() * (2 * math.pi / _TURN)
        return torch.stack((angles.cos(), angles.sin())) * attention_factor(scaling)

    def first(self, length: int) -> Tensor:
        """The same for a text of that length: [2, length, R/2]."""
        if not self.config.follows_length:
            return self.table[:, :length]  # without a gather
        positions = torch.arange(length, device=self.table.device)
        return self(positions, positions[-1:] + 1)

    def _make_table(self) -> Tensor:
        # float64 throughout: in float32 the angle of position 100,000 is already off by 0.006 radians. Computed on
        # torch's default device, the CPU, because MPS has no float64.
        scaling, positions = self.config.scaling, torch.arange(self.max_sequence_length + 1)
        match scaling:
            case DynamicScaling():
                lengths = positions[scaling.original_max_position_embeddings :]
                lengths = lengths if len(lengths) else positions[-1:]
            case LongropeScaling():
                lengths = torch.arange(2) + scaling.original_max_position_embeddings
            case _:
                angles = torch.outer(
                    positions[:-1].double(), frequencies(self.config, self.rotary_dim, positions[:1])[0]
                )
                return (torch.stack((angles.cos(), angles.sin())) * attention_factor(scaling)).float()
        turns = frequencies(self.config, self.rotary_dim, lengths) / (2 * math.pi)
        return (turns % 1 * _TURN).round().long()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rope:
        # Only the device follows the module. Converted to bf16, 512 positions would have 385 distinct angles;
        # materialized from the meta device, the table would be uninitialized memory.
        self.table = self._make_table().to(fn(self.table).device)
        return self


def frequencies(config: RopeConfig, rotated: int, lengths: Tensor) -> Tensor:
    """Radians per position of R = `rotated` components in texts of lengths [N]: float64 [N, R/2], or [1, R/2] where the
    length does not matter.

    Source: transformers, modeling_rope_utils.py, which follows the papers that each section of the configuration names;
    llama3: meta-llama/llama-models, models/llama3/model.py, apply_scaling.
    """
    exponents = torch.arange(0, rotated, 2, dtype=torch.float64)[None] / max(rotated, 1)  # [1, R/2]
    plain, scaling = config.theta**-exponents, config.scaling
    match scaling:
        case None:
            return plain
        case LinearScaling():
            return plain / scaling.factor
        case NtkScaling():
            return scaling.raised(config.theta, rotated) ** -exponents
        case DynamicScaling():
            read = lengths.double() / scaling.original_max_position_embeddings
            growth = 1 + scaling.factor * (read.clamp(min=1) - 1)
            return (config.theta * growth[:, None] ** (rotated / (rotated - 2))) ** -exponents
        case YarnScaling():
            kept = 1 - _ramp(scaling, config.theta, rotated)
            return plain * (kept + (1 - kept) / scaling.factor)
        case LongropeScaling():
            factors = torch.tensor((scaling.short_factor, scaling.long_factor), dtype=torch.float64)
            return plain / factors[(lengths > scaling.original_max_position_embeddings).long()]
        case Llama3Scaling():
            turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: divided, 1: kept
            return plain * (kept + (1 - kept) / scaling.factor)


def _ramp(scaling: YarnScaling, theta: float, rotated: int) -> Tensor:
    """YaRN's share of interpolation, from 0 for fast frequencies to 1 for slow ones: [R/2]."""
    ends = []
    for turns in (scaling.beta_fast, scaling.beta_slow):
        reach = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        ends.append(rotated * math.log(reach) / (2 * math.log(theta)))
    if scaling.truncate:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    low, high = max(ends[0], 0), min(ends[1], rotated - 1)
    width = high - low or 0.001
    return ((torch.arange(rotated // 2, dtype=torch.float64) - low) / width).clamp(0, 1)


def attention_factor(scaling: RopeScaling | None) -> float:
    """The factor on rotated queries and on rotated keys; attention logits grow by its square."""
    if isinstance(scaling, LongropeScaling):
        return scaling.attention_factor
    if not isinstance(scaling, YarnScaling):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    growth = 0.1 * math.log(scaling.factor)
    if scaling.mscale is None or scaling.mscale_all_dim is None:
        return growth + 1
    return (growth * scaling.mscale + 1) / (growth * scaling.mscale_all_dim + 1)


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
