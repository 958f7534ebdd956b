"""A decoder-only transformer whose shape ModelConfig defines.

B rows, T tokens, D model width, V token ids.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretune.core.config import InputError
from pretune.model.attention import Attention, Cache, Context, KVCache, Mask, mask_of, skips_blocks
from pretune.model.config import ModelConfig
from pretune.model.layers import MLP, EmbeddingScale, Norm
from pretune.model.long_rows import Parts, attends_in_parts
from pretune.model.rope import Rope


class Block(nn.Module):
    """Attention, then the feed-forward network; each adds to the residual stream. Norms: see NormConfig.placement."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = _norm_unless(config, "after")
        self.attention = Attention(config, layer)
        self.post_attention_norm = _norm_unless(config, "before")
        self.mlp_norm = _norm_unless(config, "after")
        self.mlp = MLP(config)
        self.post_mlp_norm = _norm_unless(config, "before")
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.dropout(self.post_attention_norm(self.attention(self.attention_norm(x), context)))
        return x + self.dropout(self.post_mlp_norm(self.mlp(self.mlp_norm(x))))


def _norm_unless(config: ModelConfig, placement: str) -> nn.Module:
    """A sublayer's norm; nothing if norms have that placement."""
    return nn.Identity() if config.norm.placement == placement else Norm(config.dim, config.norm)


class Transformer(nn.Module):
    """The model, from token ids to hidden states; `unembed` turns hidden states into logits.

    Call `reset_parameters` or load weights after building it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.padded_vocab_size, config.dim)
        self.position_embedding = None
        if config.learned_positions:
            self.position_embedding = nn.Embedding(config.max_sequence_length, config.dim)
        self.rope = Rope(config.rope, config.head_dim, config.max_sequence_length)
        self.local_rope = None
        if config.rope.local_theta is not None:
            local = config.rope.model_copy(update={"theta": config.rope.local_theta, "scaling": None})
            self.local_rope = Rope(local, config.head_dim, config.max_sequence_length)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.embedding_norm = Norm(config.dim, config.norm) if config.normalize_embedding else None
        self.input_scale = EmbeddingScale(config.dim) if config.scale_embedding else None
        self.stream_scale, self.embedding_scale = None, None
        if config.residual_scalars:
            self.stream_scale = nn.Parameter(torch.ones(config.num_layers))
            self.embedding_scale = nn.Parameter(torch.zeros(config.num_layers))
        self.norm = Norm(config.dim, config.norm)
        self.head = None if config.tied_embeddings else nn.Linear(config.dim, config.padded_vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, document_ids: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Hidden states after the final norm, [B, T, D], of tokens [B, T].

        With document_ids [B, T], positions attend within their own document and are counted from its start. With a
        cache, the tokens continue what it holds; in a KVCache they fill the columns that it was advanced by. Raises
        InputError for a sequence longer than max_sequence_length.
        """
        self._check_length(tokens.shape[1])
        context = self._context(tokens, document_ids, cache)
        x = self.embedding(tokens)  # [B, T, D]
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        if self.input_scale is not None:
            x = self.input_scale(x)
        if self.position_embedding is not None:
            x = x + self.position_embedding(context.positions)
        x = start = self.dropout(x)
        for index, layer in enumerate(self.layers):
            if self.stream_scale is not None and self.embedding_scale is not None:
                x = self.stream_scale[index] * x + self.embedding_scale[index] * start
            x = layer(x, context)
        return self.norm(x)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]; V is vocab_size, without padding rows."""
        logits = F.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)
        logits = logits[..., : self.config.vocab_size]
        if self.config.softcap is None:
            return logits
        return self.config.softcap * torch.tanh(logits.float() / self.config.softcap)

    def new_cache(self, starts: Tensor, capacity: int) -> KVCache:
        """An empty cache of `capacity` columns, in the compute dtype, for rows that start at columns starts [B]."""
        device = starts.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.head_weight.dtype
        return KVCache(self.config, starts, capacity, dtype)

    @property
    def embedded(self) -> nn.Module:
        """The module whose output is the embedded tokens, which the first layer reads."""
        return self.input_scale or self.embedding

    @property
    def head_weight(self) -> Tensor:
        """The output head's matrix [V and padding rows, D]; the embedding table if tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Initialize the weights: the same generator state gives the same weights, whatever the model's device."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                noise = torch.randn(parameter.shape, generator=generator, device=generator.device)
                parameter.copy_(noise.mul_(self._initial_std(name)))
            elif name.endswith("norm.weight"):
                parameter.fill_(1.0 - self.config.norm.offset)
            else:
                parameter.fill_(0.0 if name.endswith(("bias", "embedding_scale")) else 1.0)

    def _initial_std(self, name: str) -> float:
        """Standard deviation for initializing the matrix `name`."""
        init = self.config.init
        if name in ("embedding.weight", "position_embedding.weight"):
            return init.embedding_std
        if name == "head.weight":
            return init.head_std
        if name.endswith(("attention.output.weight", "mlp.down.weight")):
            return {"scaled": init.std / (2 * self.config.num_layers) ** 0.5, "zero": 0.0, "plain": init.std}[
                init.output
            ]
        if name.endswith("value_gate.weight"):
            return 0.0
        if name.endswith("value_embedding.weight"):
            return init.std * self.config.dim**0.5  # matches the values that it is added to
        return init.std

    def _check_length(self, length: int) -> None:
        limit = self.config.max_sequence_length
        if length > limit:
            raise InputError(
                f"a sequence of {length} tokens is longer than the {limit} positions of the model; "
                "shorten it or raise model.max_sequence_length"
            )

    def _skips_blocks(self, tokens: Tensor) -> bool:
        return skips_blocks(tokens, self.config.dropout if self.training else 0.0)

    def _context(self, tokens: Tensor, document_ids: Tensor | None, cache: Cache | None) -> Context:
        """Positions and masks of `tokens`: per document, or continuing what the cache holds."""
        windows = {self.config.window_of(layer) for layer in range(self.config.num_layers)}
        if cache is not None:
            assert document_ids is None, "a cache holds one document per row"
            positions = cache.positions()
            masks = {window: cache.mask(window) for window in windows}
            return Context(tokens, positions, *self._rotations(positions, positions[:, -1:] + 1), masks, cache)
        masks = {window: self._mask(tokens, document_ids, window) for window in windows}
        if document_ids is None:
            length = tokens.shape[1]
            positions, whole = torch.arange(length, device=tokens.device), self.rope.first(length)
            local = self.local_rope.first(length) if self.local_rope else whole
            return Context(tokens, positions, whole, local, masks, None)
        # Numbered in the order of the row, a document begins and ends where its number would be inserted: [B, T]
        numbers = F.pad(document_ids.diff(dim=1) != 0, (1, 0)).cumsum(1)
        begins = torch.searchsorted(numbers, numbers)
        positions = torch.arange(tokens.shape[1], device=tokens.device) - begins
        lengths = None
        if self.rope.config.follows_length:
            lengths = torch.searchsorted(numbers, numbers, right=True) - begins
        return Context(tokens, positions, *self._rotations(positions, lengths), masks, None)

    def _mask(self, tokens: Tensor, document_ids: Tensor | None, window: int | None) -> Mask:
        """The mask of layers with that window."""
        dropout, softcap = self.config.dropout if self.training else 0.0, self.config.attention_softcap
        masked = document_ids is not None or window is not None
        if masked and attends_in_parts(tokens, dropout, softcap):
            return Parts(torch.zeros_like(tokens) if document_ids is None else document_ids, window)
        return mask_of(tokens, document_ids, window, self._skips_blocks(tokens), softcap is not None)

    def _rotations(self, positions: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Cosines and sines for layers without and with a window, see Rope."""
        whole = self.rope(positions, lengths)
        return whole, whole if self.local_rope is None else self.local_rope(positions)
