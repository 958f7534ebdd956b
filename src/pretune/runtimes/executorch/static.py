"""The transformer in the form that ExecuTorch's language-model runner calls: one text, with the cache inside the model.

T new tokens, S columns of the cache, H query heads, G key-value heads, K head width, D model width, V token ids.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class StaticCache:
    """Keys and values of one text in fixed-size buffers, for a single call of the model.

    It uses ExecuTorch's operators for language models, which write into the buffers in place and read only the filled
    columns.
    """

    def __init__(self, memory: nn.ModuleList, start: Tensor, num_new: int) -> None:
        self._memory, self._num_new = memory, num_new
        self._start, self._first = start, start[0].item()
        capacity: int = memory[0].keys.shape[1]  # type: ignore[union-attr, index]
        # Tell the compiler what it cannot infer: the tokens fit into the cache.
        torch._check(self._first >= 0)
        torch._check(self._first < capacity)
        torch._check(self._first + num_new <= capacity)
        self._capacity = capacity

    def positions(self) -> Tensor:
        """Positions [1, T] of the new tokens."""
        return (self._start + torch.arange(self._num_new))[None]

    def mask(self, window: int | None) -> Tensor | None:
        """None for layers without a window; else an additive mask (0 or -inf) of new tokens and columns: [T, S]."""
        if window is None:
            return None
        queries, keys = self.positions()[0, :, None], torch.arange(self._capacity)
        seen = (keys <= queries) & (keys > queries - window)
        return torch.where(seen, 0.0, -torch.inf)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, logits: Any) -> Tensor:
        """Store new keys and values [1, T, G, K]; attend from queries [1, T, H, K] to all stored ones: [1, T, H, K]."""
        memory: Any = self._memory[layer]
        for stored, new in ((memory.keys, k), (memory.values, v)):
            torch.ops.llama.update_cache(new.contiguous(), stored, self._first)
        # With a mask, the operator reads all columns; without one, those before `start` and the new ones.
        start = self._first if mask is None else 0
        return torch.ops.llama.custom_sdpa(q, memory.keys, memory.values, start, mask, 0.0, mask is None, logits.scale)


class LayerMemory(nn.Module):
    """Keys and values of one layer, [1, S, G, K]."""

    keys: Tensor
    values: Tensor

    def __init__(self, capacity: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(1, capacity, num_kv_heads, head_dim), persistent=False)
        self.register_buffer("values", torch.zeros(1, capacity, num_kv_heads, head_dim), persistent=False)


class PhoneModel(nn.Module):
    """(tokens [1, T], position of the first of them [1]) -> logits [1, V] after the last; both int64.

    The cache has `capacity` columns; logits are for the first `vocab_size` ids, those of the tokenizer.
    """

    def __init__(self, model: nn.Module, capacity: int, vocab_size: int) -> None:
        super().__init__()
        config: Any = model.config
        self.model, self.vocab_size = model, vocab_size
        self.memory = nn.ModuleList(
            LayerMemory(capacity, config.num_kv_heads, config.head_dim) for _ in range(config.num_layers)
        )

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        model: Any = self.model
        hidden = model(tokens, cache=StaticCache(self.memory, input_pos, tokens.shape[1]))  # [1, T, D]
        return model.unembed(hidden[:, -1])[:, : self.vocab_size]


class PackedTable(nn.Module):
    """An embedding table stored as integers for ExecuTorch's operators; 4-bit integers are packed two per byte."""

    packed: Tensor
    scales: Tensor

    def __init__(self, weight: Any) -> None:
        """weight [V, D]: torchao's IntxUnpackedToInt8Tensor with 4 or 8 bits and a scale per group or row."""
        super().__init__()
        self.dtype: torch.dtype = weight.dtype
        self.bits = 4 if str(weight.target_dtype) == "torch.int4" else 8
        numbers, scales = weight.qdata, weight.scale
        if self.bits == 4:
            shifted = (numbers + 8).to(torch.uint8)
            numbers = shifted[:, ::2] << 4 | shifted[:, 1::2]
        halved = scales.bfloat16()
        # Scales are stored as bfloat16 if that is exact; the operator multiplies in float32 in any case.
        self.register_buffer("packed", numbers)
        self.register_buffer("scales", halved if torch.equal(halved.to(scales.dtype), scales) else scales)

    def forward(self, tokens: Tensor) -> Tensor:
        """Vectors [..., D] of tokens [...]."""
        ops = torch.ops.quantized_decomposed
        if self.bits == 4:
            return ops.embedding_4bit.dtype(self.packed, self.scales, None, -8, 7, tokens, dtype=self.dtype)
        return ops.embedding_byte.dtype(self.packed, self.scales, None, -128, 127, tokens, dtype=self.dtype)


def pack_tables(model: nn.Module) -> None:
    """Replace each embedding that is stored as integers by a PackedTable. A tied head must have become a separate layer
    before (quantization.convert does that)."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding) and hasattr(module.weight, "qdata"):
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, PackedTable(module.weight))
