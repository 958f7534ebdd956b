"""Causal self-attention with grouped queries, and the cache that decoding keeps keys and values in.

B rows, T new tokens, S cached and new tokens, H query heads, G key-value heads, K head width, D model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretune.model.config import ModelConfig
from pretune.model.layers import Norm
from pretune.model.rope import rotate


class KVCache:
    """Keys and values of the tokens that a model has read, in memory set aside once.

    starts [B]: the column of each row's first real token; columns before it are padding on the left. `length`: columns
    filled so far; the model's forward moves it on.
    """

    def __init__(self, config: ModelConfig, starts: Tensor, capacity: int, dtype: torch.dtype) -> None:
        shape = (config.num_layers, 2, len(starts), config.num_kv_heads, capacity, config.head_dim)
        # Zeros, not empty: a mask turns the weight of padding into 0, and 0 x NaN would still be NaN.
        self._memory = torch.zeros(shape, dtype=dtype, device=starts.device)  # [layers, 2, B, G, capacity, K]
        self.starts, self.capacity, self.length = starts, capacity, 0

    def positions(self, num_new: int) -> Tensor:
        """Positions of the next `num_new` columns, counted from each row's first real token: [B, T]."""
        return (self._columns(num_new) - self.starts[:, None]).clamp(min=0)

    def mask(self, num_new: int) -> Tensor:
        """Which columns each new one attends to: [B, 1, T, S]. Padding sees itself: a softmax over nothing is NaN."""
        keys = torch.arange(self.length + num_new, device=self.starts.device)
        queries = self._columns(num_new)[:, None]  # [T, 1]
        real = keys >= self.starts[:, None, None]  # [B, 1, S]
        return ((keys <= queries) & real | (keys == queries))[:, None]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values [B, G, T, K] of a layer; return all of them so far, [B, G, S, K]."""
        stop = self.length + keys.shape[2]
        assert stop <= self.capacity, f"{stop} columns in a cache of {self.capacity}"
        memory = self._memory[layer]
        memory[0, :, :, self.length : stop] = keys
        memory[1, :, :, self.length : stop] = values
        filled = memory[:, :, :, :stop].to(keys.dtype)
        return filled[0], filled[1]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch only: integer indices."""
        self._memory, self.starts = self._memory[:, :, rows], self.starts[rows]

    def _columns(self, num_new: int) -> Tensor:
        return torch.arange(self.length, self.length + num_new, device=self.starts.device)


class Attention(nn.Module):
    """Multi-head attention; queries, keys and values come from one matrix, rows in that order, head by head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.dropout = config.dropout
        width = config.num_heads * config.head_dim
        qkv_width = width + 2 * config.num_kv_heads * config.head_dim
        self.qkv = nn.Linear(config.dim, qkv_width, bias=config.bias.qkv)
        self.output = nn.Linear(width, config.dim, bias=config.bias.attention_output)
        self.query_norm = Norm(config.head_dim, config.norm) if config.qk_norm else None
        self.key_norm = Norm(config.head_dim, config.norm) if config.qk_norm else None

    def forward(
        self, x: Tensor, cos_sin: Tensor, mask: Tensor | None, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D]. mask [B, 1, T, S] is true where attention is allowed; None means causal."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # [B, T, H + 2 G, K]
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = rotate(q, cos_sin), rotate(k, cos_sin)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # [B, H or G, T, K]
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
            enable_gqa=self.num_kv_heads < self.num_heads,
        )
        return self.output(y.transpose(1, 2).flatten(2))
