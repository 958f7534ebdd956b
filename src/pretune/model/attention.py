"""Causal self-attention with grouped queries, and the cache that decoding keeps keys and values in.

B rows, T new tokens, S cached and new tokens, H query heads, G key-value heads, K head width, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

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

    def mask(self, num_new: int, window: int | None) -> Tensor:
        """Which columns each new one attends to: [B, 1, T, S]. Padding sees itself: a softmax over nothing is NaN."""
        keys = torch.arange(self.length + num_new, device=self.starts.device)
        queries = self._columns(num_new)[:, None]  # [T, 1]
        real = keys >= self.starts[:, None, None]  # [B, 1, S]
        return (causal(queries, keys, window) & real | (keys == queries))[:, None]

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


def causal(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which columns `keys` [S] the columns `queries` [T, 1] see: the newest `window` (None: all) up to their own. Or of
    one query, one key."""
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


Mask = Tensor | BlockMask | None
"""[B or 1, 1, T, S], true where attention is allowed; the same as blocks, so that a kernel may skip the forbidden ones;
or None for plainly causal."""


@dataclass(frozen=True)
class Context:
    """What every layer is told of the tokens beside the residual stream.

    tokens [B, T]; cos_sin: of their positions, see Rope; masks: by window.
    """

    tokens: Tensor
    cos_sin: Tensor
    masks: Mapping[int | None, Mask]
    cache: KVCache | None


def skips_blocks(tokens: Tensor, dropout: float) -> bool:
    """Whether a masked attention skips what the mask forbids: in code compiled for CUDA, where the weights have no
    dropout. Elsewhere it computes everything; written out step by step, flex attention would be slower than that."""
    return tokens.device.type == "cuda" and torch.compiler.is_compiling() and dropout == 0


def mask_of(tokens: Tensor, document_ids: Tensor | None, window: int | None, skipping: bool) -> Mask:
    """The mask of layers with that window over tokens [B, T], closed between documents if document_ids [B, T] are
    given. `skipping`: as blocks."""
    length = tokens.shape[1]
    if document_ids is None and window is None:
        return None
    if not skipping:
        columns = torch.arange(length, device=tokens.device)
        seen = causal(columns[:, None], columns, window)[None]  # [1, T, T]
        if document_ids is not None:
            seen = seen & (document_ids[:, :, None] == document_ids[:, None, :])  # [B, T, T]
        return seen[:, None]

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = causal(query, key, window)
        return seen if document_ids is None else seen & (document_ids[row, query] == document_ids[row, key])

    rows = None if document_ids is None else len(tokens)
    return create_block_mask(allowed, rows, None, length, length, device=tokens.device)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float) -> Tensor:
    """Attention of queries [B, H, T, K] to keys and values [B, G, S, K] -> [B, H, T, K]."""
    grouped = k.shape[1] < q.shape[1]
    if isinstance(mask, BlockMask):
        y = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)
        assert isinstance(y, Tensor)
        return y
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


class Attention(nn.Module):
    """Multi-head attention; queries, keys and values come from one matrix, rows in that order, head by head."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.window = layer, config.window_of(layer)
        self.scale = config.attention_scale / config.head_dim**0.5
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.dropout = config.dropout
        width = config.num_heads * config.head_dim
        qkv_width = width + 2 * config.num_kv_heads * config.head_dim
        self.qkv = nn.Linear(config.dim, qkv_width, bias=config.bias.qkv)
        self.output = nn.Linear(width, config.dim, bias=config.bias.attention_output)
        self.query_norm = Norm(config.head_dim, config.norm) if config.qk_norm else None
        self.key_norm = Norm(config.head_dim, config.norm) if config.qk_norm else None
        self.value_embedding, self.value_gate = None, None
        if config.has_value_embedding(layer):
            self.value_embedding = nn.Embedding(config.padded_vocab_size, config.num_kv_heads * config.head_dim)
            self.value_gate = nn.Linear(config.dim, config.num_kv_heads, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # [B, T, H + 2 G, K]
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = rotate(q, context.cos_sin), rotate(k, context.cos_sin)
        if self.value_embedding is not None and self.value_gate is not None:
            gate = 2 * self.value_gate(x).sigmoid()  # [B, T, G]: 1 where the gate's weights are 0
            table = self.value_embedding(context.tokens).unflatten(-1, (-1, self.head_dim))  # [B, T, G, K]
            v = v + gate[..., None] * table.to(v.dtype)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # [B, H or G, T, K]
        if context.cache is not None:
            k, v = context.cache.extend(self.layer, k, v)
        y = attend(q, k, v, context.masks[self.window], self.scale, self.dropout if self.training else 0.0)
        return self.output(y.transpose(1, 2).flatten(2))
