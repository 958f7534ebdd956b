"""Causal grouped-query self-attention, its masks, and the key-value cache for decoding.

B rows, T new tokens, S cached and new tokens, H query heads, G key-value heads, K head width, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from pretune.model.config import ModelConfig
from pretune.model.layers import Norm
from pretune.model.long_rows import Parts, attend_in_parts
from pretune.model.rope import rotate
from pretune.model.rope_config import LongropeScaling


class Logits(NamedTuple):
    """How attention logits are made: scale * (query . key), and with a softcap, softcap * tanh(logits / softcap)."""

    scale: float
    softcap: float | None


class Cache(Protocol):
    """Interface of a key-value cache, as the model uses it."""

    def positions(self) -> Tensor:
        """Positions [B, T] of the new tokens."""
        ...

    def mask(self, window: int | None) -> Mask:
        """The mask to pass to `attend` in layers with that window."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Mask, logits: Logits) -> Tensor:
        """Store a layer's new keys and values [B, T, G, K], and attend from queries [B, T, H, K] to all stored ones:
        [B, T, H, K]."""
        ...


class KVCache:
    """Keys and values of the tokens read so far, in preallocated memory.

    starts [B]: the column of each row's first real token; columns before it are left padding. Call `advance` before
    each forward pass with the number of columns that it fills. Everything that changes from token to token is in
    tensors, so that a compiled step stays valid.
    """

    def __init__(self, config: ModelConfig, starts: Tensor, capacity: int, dtype: torch.dtype) -> None:
        shape = (len(starts), config.num_kv_heads, capacity, config.head_dim)
        # Zeros, not empty: padding gets attention weight 0, but 0 x NaN would still be NaN.
        # Separate tensors per layer, and for keys and values, because the compiler updates only whole tensors in place.
        self._keys = [torch.zeros(shape, dtype=dtype, device=starts.device) for _ in range(config.num_layers)]
        self._values = [torch.zeros_like(keys) for keys in self._keys]  # [B, G, capacity, K]
        self._columns = torch.zeros(0, dtype=torch.int64, device=starts.device)
        self._visible, self._length = capacity, 0
        self.starts, self.capacity = starts, capacity
        scaling = config.rope.scaling
        self._original: int | None = None
        if isinstance(scaling, LongropeScaling):
            self._original = scaling.original_max_position_embeddings
            self._tokens = torch.zeros(len(starts), capacity, dtype=torch.int64, device=starts.device)

    def to_read(self, tokens: Tensor) -> Tensor:
        """What to read, and `advance` by, in order to continue with tokens [B, T]: these alone; or all tokens so far
        and these, if a text now grows beyond the length up to which longrope has the short factors.

        Every key in the cache has the rotation of the short factors then, and values above the first layer follow from
        it. So the cache is emptied, and all is read with the rotation that holds now, as transformers' Phi-3 does; but
        by each row's own length, so that a text does not depend on others in the batch.
        """
        if self._original is None:
            return tokens
        end = self._length + tokens.shape[1]
        self._tokens[:, self._length : end] = tokens
        before, after = self._length - self.starts, end - self.starts
        if self._length == 0 or not ((before <= self._original) & (after > self._original)).any():
            return tokens
        self._length = 0
        return self._tokens[:, :end]

    def advance(self, num_new: int, whole: bool = False) -> None:
        """Announce that the next forward pass fills `num_new` columns. It attends over the `whole` memory, or only over
        the filled columns."""
        start, self._length = self._length, self._length + num_new
        assert self._length <= self.capacity, f"{self._length} columns in a cache of {self.capacity}"
        self._columns = torch.arange(start, self._length, device=self.starts.device)  # [T]
        self._visible = self.capacity if whole else self._length

    def positions(self) -> Tensor:
        """Positions of the new columns, counted from each row's first real token: [B, T]."""
        return (self._columns - self.starts[:, None]).clamp(min=0)

    def mask(self, window: int | None) -> Tensor:
        """Additive mask [B, 1, T, S]: 0 where a new column attends, else -inf. Padding attends to itself, because a
        softmax over nothing is NaN."""
        keys = torch.arange(self._visible, device=self.starts.device)
        queries = self._columns[:, None]  # [T, 1]
        real = keys >= self.starts[:, None, None]  # [B, 1, S]
        seen = (causal(queries, keys, window) & real | (keys == queries))[:, None]
        # Additive rather than boolean: attention would convert a boolean mask again in every layer.
        return torch.zeros(seen.shape, dtype=self._keys[0].dtype, device=seen.device).masked_fill_(~seen, -torch.inf)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Mask, logits: Logits) -> Tensor:
        """Store a layer's new keys and values [B, T, G, K]; attend from queries [B, T, H, K] to all stored ones."""
        memory = self._keys[layer], self._values[layer]
        for stored, new in zip(memory, (k, v), strict=True):
            stored.index_copy_(2, self._columns, new.transpose(1, 2).to(stored.dtype))
        keys, values = (stored[:, :, : self._visible].to(k.dtype) for stored in memory)  # [B, G, S, K]
        return attend(q.transpose(1, 2), keys, values, mask, logits, 0.0).transpose(1, 2)

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows of the batch: integer indices, possibly repeated."""
        self._keys, self._values = ([one[rows] for one in memory] for memory in (self._keys, self._values))
        self.starts = self.starts[rows]
        if self._original is not None:
            self._tokens = self._tokens[rows]


def causal(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Whether columns `queries` [T, 1] attend to columns `keys` [S]: the newest `window` (None: all) up to their own.
    Also works for a single query and key."""
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


Mask = Tensor | BlockMask | Parts | None
"""A tensor [B or 1, 1, T, S], boolean (true where attention is allowed) or additive; a block mask, which lets a kernel
skip fully masked blocks; the parts of long rows on a CPU; or None for plain causal attention."""


@dataclass(frozen=True)
class Context:
    """Inputs of every layer besides the residual stream.

    tokens [B, T]; positions [T] or [B, T]; cos_sin: their cosines and sines, see Rope, and those in layers that have a
    window; masks: by window.
    """

    tokens: Tensor
    positions: Tensor
    cos_sin: Tensor
    local_cos_sin: Tensor
    masks: Mapping[int | None, Mask]
    cache: Cache | None


def skips_blocks(tokens: Tensor, dropout: float) -> bool:
    """Whether masked attention uses flex attention, which skips fully masked blocks: only in code compiled for CUDA and
    without attention dropout. Elsewhere everything is computed, because eager flex attention would be slower still, and
    before compute capability 8.0, the shared memory is too small for its kernels with wide heads in float32."""
    if tokens.device.type != "cuda" or not torch.compiler.is_compiling() or dropout > 0:
        return False
    return torch.cuda.get_device_capability(tokens.device) >= (8, 0)


def mask_of(
    tokens: Tensor, document_ids: Tensor | None, window: int | None, skipping: bool, always: bool = False
) -> Mask:
    """The mask for layers with that window over tokens [B, T]; with document_ids [B, T], no attention between
    documents. `skipping`: return a block mask. `always`: return a mask for plain causal attention too."""
    length = tokens.shape[1]
    if document_ids is None and window is None and not always:
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


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, logits: Logits, dropout: float) -> Tensor:
    """Attend from queries [B, H, T, K] to keys and values [B, G, S, K] -> [B, H, T, K]. With a softcap, there must be a
    mask."""
    grouped, softcap = k.shape[1] < q.shape[1], logits.softcap
    if isinstance(mask, Parts):
        return attend_in_parts(q, k, v, mask, logits.scale)
    if isinstance(mask, BlockMask):

        def capped(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score if softcap is None else softcap * torch.tanh(score / softcap)

        change = None if softcap is None else capped
        y = flex_attention(q, k, v, change, block_mask=mask, scale=logits.scale, enable_gqa=grouped)
        assert isinstance(y, Tensor)
        return y
    if softcap is not None:
        assert mask is not None, "capped attention needs a mask"
        return _capped_attention(q, k, v, mask, logits.scale, softcap, dropout)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=logits.scale, enable_gqa=grouped
    )


def _capped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float, dropout: float
) -> Tensor:
    """The same, written out with logits in float32, because no kernel of torch's own has softcaps."""
    grouped = q.unflatten(1, (k.shape[1], -1))  # [B, G, H/G, T, K]
    scores = (grouped @ k[:, :, None].mT).float() * scale  # [B, G, H/G, T, S]
    capped = softcap * torch.tanh(scores / softcap)
    mask = mask[:, :, None]
    capped = capped.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else capped + mask
    weights = F.dropout(capped.softmax(-1).to(v.dtype), dropout)
    return (weights @ v[:, :, None]).flatten(1, 2)


class Attention(nn.Module):
    """Multi-head attention; one matrix projects to queries, keys and values, its rows in that order, head by head."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.window, self.rotated = layer, config.window_of(layer), config.is_rotated(layer)
        self.logits = Logits(config.attention_scale / config.head_dim**0.5, config.attention_softcap)
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.dropout = config.dropout
        width = config.num_heads * config.head_dim
        qkv_width = width + 2 * config.num_kv_heads * config.head_dim
        self.qkv = nn.Linear(config.dim, qkv_width, bias=config.bias.qkv)
        # Optimizers that treat a matrix as a whole (Muon) must treat these as three.
        self.qkv.rows = (width, config.num_kv_heads * config.head_dim, config.num_kv_heads * config.head_dim)  # type: ignore[assignment]
        self.output = nn.Linear(width, config.dim, bias=config.bias.attention_output)
        self.query_norm, self.key_norm, self.whole_norm = None, None, config.qk_norm_over == "all_heads"
        if config.qk_norm:
            self.query_norm, self.key_norm = (Norm(size, config.norm) for size in config.qk_norm_sizes)
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
            if self.whole_norm:
                normalized = self.query_norm(q.flatten(2)), self.key_norm(k.flatten(2))
                q_k = torch.cat(normalized, dim=2).unflatten(2, (-1, self.head_dim))
            else:
                q_k = torch.cat((self.query_norm(q), self.key_norm(k)), dim=2)
        if self.rotated:  # both at once: for a single token, the number of operations determines the time
            q_k = rotate(q_k, context.cos_sin if self.window is None else context.local_cos_sin)
        q, k = q_k.split([self.num_heads, self.num_kv_heads], dim=2)
        if self.value_embedding is not None and self.value_gate is not None:
            gate = 2 * self.value_gate(x).sigmoid()  # [B, T, G]: 1 where the gate's weights are 0
            table = self.value_embedding(context.tokens).unflatten(-1, (-1, self.head_dim))  # [B, T, G, K]
            v = v + gate[..., None] * table.to(v.dtype)
        mask = context.masks[self.window]
        if context.cache is not None:
            return self.output(context.cache.attend(self.layer, q, k, v, mask, self.logits).flatten(2))
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # [B, H or G, T, K]
        y = attend(q, k, v, mask, self.logits, self.dropout if self.training else 0.0)
        return self.output(y.transpose(1, 2).flatten(2))
