"""The transformer in the form that ExecuTorch's runner of language models calls: one text, its memory inside the model.

T new tokens, S columns of the memory, H query heads, G key-value heads, K head width, D model width, V token ids.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class StaticCache:
    """Keys and values of one text in buffers of a fixed size, for one call of the model that they belong to.

    It attends with ExecuTorch's own operators for language models, which write into the buffers in place and look at
    no more columns than are filled.
    """

    def __init__(self, memory: nn.ModuleList, start: Tensor, num_new: int) -> None:
        self._memory, self._num_new = memory, num_new
        self._start, self._first = start, start[0].item()
        capacity: int = memory[0].keys.shape[1]  # type: ignore[union-attr, index]
        # What the compiler cannot know: the tokens fit.
        torch._check(self._first >= 0)
        torch._check(self._first < capacity)
        torch._check(self._first + num_new <= capacity)
        self._capacity = capacity

    def positions(self) -> Tensor:
        """Positions [1, T] of the new tokens."""
        return (self._start + torch.arange(self._num_new))[None]

    def mask(self, window: int | None) -> Tensor | None:
        """None for layers that see everything before; else 0 or -inf for each new token and column: [T, S]."""
        if window is None:
            return None
        queries, keys = self.positions()[0, :, None], torch.arange(self._capacity)
        seen = (keys <= queries) & (keys > queries - window)
        return torch.where(seen, 0.0, -torch.inf)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Store new keys and values [1, T, G, K]; attention of queries [1, T, H, K], of the same shape."""
        memory: Any = self._memory[layer]
        for stored, new in ((memory.keys, k), (memory.values, v)):
            torch.ops.llama.update_cache(new.contiguous(), stored, self._first)
        # With a mask, the operator looks at all columns; without one, at those before `start` and the new ones.
        start = self._first if mask is None else 0
        return torch.ops.llama.custom_sdpa(q, memory.keys, memory.values, start, mask, 0.0, mask is None, scale)


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

    `capacity` columns of memory; logits of the first `vocab_size` ids, those that the tokenizer knows.
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
    """A table of vectors stored as integers, two in a byte where they have 4 bits, for ExecuTorch's operators."""

    packed: Tensor
    scales: Tensor

    def __init__(self, weight: Any) -> None:
        """weight [V, D]: torchao's IntxUnpackedToInt8Tensor of 4 or 8 bits, with a scale for each group or row."""
        super().__init__()
        self.dtype: torch.dtype = weight.dtype
        self.bits = 4 if str(weight.target_dtype) == "torch.int4" else 8
        numbers, scales = weight.qdata, weight.scale
        if self.bits == 4:
            shifted = (numbers + 8).to(torch.uint8)
            numbers = shifted[:, ::2] << 4 | shifted[:, 1::2]
        halved = scales.bfloat16()
        # Scales that bfloat16 holds are stored in it; the operator multiplies in float32 all the same.
        self.register_buffer("packed", numbers)
        self.register_buffer("scales", halved if torch.equal(halved.to(scales.dtype), scales) else scales)

    def forward(self, tokens: Tensor) -> Tensor:
        """Vectors [..., D] of tokens [...]."""
        ops = torch.ops.quantized_decomposed
        if self.bits == 4:
            return ops.embedding_4bit.dtype(self.packed, self.scales, None, -8, 7, tokens, dtype=self.dtype)
        return ops.embedding_byte.dtype(self.packed, self.scales, None, -128, 127, tokens, dtype=self.dtype)


def pack_tables(model: nn.Module) -> None:
    """Put a PackedTable in place of each embedding that is stored as integers. Where the head shares the embedding's
    table it must have a layer of its own by now."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding) and hasattr(module.weight, "qdata"):
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, PackedTable(module.weight))
