"""Causal self-attention with grouped queries, and the cache that decoding keeps keys and values in.

B rows, T new tokens, S cached and new tokens, H query heads, G key-value heads, K head width, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from pretune.model.config import ModelConfig
from pretune.model.layers import Norm
from pretune.model.rope import rotate


class Cache(Protocol):
    """What the model asks of the memory for the tokens that it has read."""

    def positions(self) -> Tensor:
        """Positions [B, T] of the tokens that are read now."""
        ...

    def mask(self, window: int | None) -> Mask:
        """What `attend` gets in layers with that window."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
        """Store new keys and values [B, T, G, K] of a layer; attention of queries [B, T, H, K] to all of them so far,
        of the same shape."""
        ...


class KVCache:
    """Keys and values of the tokens that a model has read, in memory set aside once.

    starts [B]: the column of each row's first real token; columns before it are padding on the left. `advance` before
    each forward pass says how many columns it fills. All that changes from token to token is in tensors, so that a
    compiled step stays valid.
    """

    def __init__(self, config: ModelConfig, starts: Tensor, capacity: int, dtype: torch.dtype) -> None:
        shape = (len(starts), config.num_kv_heads, capacity, config.head_dim)
        # Zeros, not empty: a mask turns the weight of padding into 0, and 0 x NaN would still be NaN.
        # A tensor for each layer's keys and another for its values: a compiler updates whole tensors in place.
        self._keys = [torch.zeros(shape, dtype=dtype, device=starts.device) for _ in range(config.num_layers)]
        self._values = [torch.zeros_like(keys) for keys in self._keys]  # [B, G, capacity, K]
        self._columns = torch.zeros(0, dtype=torch.int64, device=starts.device)
        self._visible, self._length = capacity, 0
        self.starts, self.capacity = starts, capacity

    def advance(self, num_new: int, whole: bool = False) -> None:
        """The next forward pass fills `num_new` columns. It looks at the `whole` memory, or at what is filled only."""
        start, self._length = self._length, self._length + num_new
        assert self._length <= self.capacity, f"{self._length} columns in a cache of {self.capacity}"
        self._columns = torch.arange(start, self._length, device=self.starts.device)  # [T]
        self._visible = self.capacity if whole else self._length

    def positions(self) -> Tensor:
        """Positions of the columns to fill, counted from each row's first real token: [B, T]."""
        return (self._columns - self.starts[:, None]).clamp(min=0)

    def mask(self, window: int | None) -> Tensor:
        """0 for the columns that each new one attends to, else -inf: [B, 1, T, S]. Padding sees itself: a softmax over
        nothing is NaN."""
        keys = torch.arange(self._visible, device=self.starts.device)
        queries = self._columns[:, None]  # [T, 1]
        real = keys >= self.starts[:, None, None]  # [B, 1, S]
        seen = (causal(queries, keys, window) & real | (keys == queries))[:, None]
        # As what is added to the logits: attention would make it of true and false in each layer anew.
        return torch.zeros(seen.shape, dtype=self._keys[0].dtype, device=seen.device).masked_fill_(~seen, -torch.inf)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
        """Store new keys and values [B, T, G, K] of a layer; attention of queries [B, T, H, K] to all so far."""
        memory = self._keys[layer], self._values[layer]
        for stored, new in zip(memory, (k, v), strict=True):
            stored.index_copy_(2, self._columns, new.transpose(1, 2).to(stored.dtype))
        keys, values = (stored[:, :, : self._visible].to(k.dtype) for stored in memory)  # [B, G, S, K]
        return attend(q.transpose(1, 2), keys, values, mask, scale, 0.0).transpose(1, 2)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch: integer indices, some perhaps more than once."""
        self._keys, self._values = ([one[rows] for one in memory] for memory in (self._keys, self._values))
        self.starts = self.starts[rows]


def causal(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which columns `keys` [S] the columns `queries` [T, 1] see: the newest `window` (None: all) up to their own. Or of
    one query, one key."""
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


Mask = Tensor | BlockMask | None
"""[B or 1, 1, T, S], true where attention is allowed, or what is added to its logits; the same as blocks, so that a
kernel may skip the forbidden ones; or None for plainly causal."""


@dataclass(frozen=True)
class Context:
    """What every layer is told of the tokens beside the residual stream.

    tokens [B, T]; cos_sin: of their positions, see Rope; masks: by window.
    """

    tokens: Tensor
    cos_sin: Tensor
    masks: Mapping[int | None, Mask]
    cache: Cache | None


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
        # Optimizers that treat a matrix as a whole are to see three.
        self.qkv.rows = (width, config.num_kv_heads * config.head_dim, config.num_kv_heads * config.head_dim)  # type: ignore[assignment]
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
        q_k, v = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=2)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = q_k.split([self.num_heads, self.num_kv_heads], dim=2)
            q_k = torch.cat((self.query_norm(q), self.key_norm(k)), dim=2)
        # Both in one: for a single token it is the number of operations that counts.
        q, k = rotate(q_k, context.cos_sin).split([self.num_heads, self.num_kv_heads], dim=2)
        if self.value_embedding is not None and self.value_gate is not None:
            gate = 2 * self.value_gate(x).sigmoid()  # [B, T, G]: 1 where the gate's weights are 0
            table = self.value_embedding(context.tokens).unflatten(-1, (-1, self.head_dim))  # [B, T, G, K]
            v = v + gate[..., None] * table.to(v.dtype)
        mask = context.masks[self.window]
        if context.cache is not None:
            return self.output(context.cache.attend(self.layer, q, k, v, mask, self.scale).flatten(2))
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # [B, H or G, T, K]
        y = attend(q, k, v, mask, self.scale, self.dropout if self.training else 0.0)
        return self.output(y.transpose(1, 2).flatten(2))
