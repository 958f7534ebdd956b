"""A decoder-only transformer with the norm before each sublayer, in the shape that ModelConfig says.

B rows, T tokens, D model width, V token ids.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretune.config import InputError
from pretune.model.attention import Attention, KVCache
from pretune.model.config import ModelConfig
from pretune.model.layers import MLP, Norm
from pretune.model.rope import Rope


class Block(nn.Module):
    """Attention, then the feed-forward network; each reads a normalized copy and adds to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = Norm(config.dim, config.norm)
        self.attention = Attention(config)
        self.mlp_norm = Norm(config.dim, config.norm)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos_sin: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cos_sin, mask, cache, layer))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Transformer(nn.Module):
    """The model, from token ids to hidden states; `unembed` makes logits of them.

    Call `reset_parameters` or load weights after building it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.padded_vocab_size, config.dim)
        self.rope = Rope(config.rope, config.head_dim, config.max_sequence_length)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = Norm(config.dim, config.norm)
        self.head = None if config.tied_embeddings else nn.Linear(config.dim, config.padded_vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, document_ids: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Hidden states after the final norm, [B, T, D], of tokens [B, T].

        With document_ids [B, T], positions attend within their own document and are counted from its start. With a
        cache, the tokens follow those that it holds, and it holds them too afterwards. Raises InputError for a sequence
        longer than max_sequence_length.
        """
        self._check_length(tokens.shape[1])
        cos_sin, mask = self._positions(tokens, document_ids, cache)
        x = self.dropout(self.embedding(tokens))  # [B, T, D]
        for index, layer in enumerate(self.layers):
            x = layer(x, cos_sin, mask, cache, index)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D], V being the ids that the model knows, without padding rows."""
        table = self.embedding.weight
        logits = F.linear(hidden, table) if self.head is None else self.head(hidden)
        logits = logits[..., : self.config.vocab_size]
        if self.config.softcap is None:
            return logits
        return self.config.softcap * torch.tanh(logits.float() / self.config.softcap)

    @property
    def head_weight(self) -> Tensor:
        """The output head's matrix [V and padding rows, D]: the embedding table where the two are tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Start afresh: the same weights for the same generator state, on whatever device the model is."""
        init, num_layers = self.config.init, self.config.num_layers
        output_std = {"scaled": init.std / (2 * num_layers) ** 0.5, "zero": 0.0, "plain": init.std}[init.output]
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
                noise = torch.randn(parameter.shape, generator=generator, device=generator.device)
                parameter.copy_(noise.mul_(output_std if into_residual else init.std))
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)

    def _check_length(self, length: int) -> None:
        limit = self.config.max_sequence_length
        if length > limit:
            raise InputError(
                f"a sequence of {length} tokens is longer than the {limit} positions of the model; "
                "shorten it or raise model.max_sequence_length"
            )

    def _positions(
        self, tokens: Tensor, document_ids: Tensor | None, cache: KVCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """Cosines and sines of every position, and the attention mask (None: causal)."""
        length = tokens.shape[1]
        if cache is not None:
            assert document_ids is None, "a cache holds one document per row"
            return self.rope(cache.positions(length)), cache.mask(length)
        if document_ids is None:
            return self.rope.first(length), None
        columns = torch.arange(length, device=tokens.device)
        same = document_ids[:, :, None] == document_ids[:, None, :]  # [B, T, T]
        mask = same & (columns <= columns[:, None])
        positions = mask.sum(-1) - 1  # how many tokens of the same document come before: [B, T]
        return self.rope(positions), mask[:, None]
