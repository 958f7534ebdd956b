"""The shape of the transformer, as YAML says it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

from pretune.core.config import Count, Fraction, Section

Activation = Literal["swiglu", "geglu", "reglu", "relu_squared", "gelu", "silu", "relu"]
GATED: frozenset[str] = frozenset({"swiglu", "geglu", "reglu"})
"""Activations that multiply two projections; the others apply a function to one."""


class NormConfig(Section):
    kind: Literal["rmsnorm", "layernorm"]
    """rmsnorm or layernorm (which centres too); either is computed in float32."""
    learned: bool
    """Whether norms have weights to learn: a scale, and for layernorm a shift."""
    eps: Annotated[float, Field(gt=0)]
    """Added to the mean square (or the variance) before the root."""


class BiasConfig(Section):
    qkv: bool
    """Biases on the query, key and value projections (Qwen2 has these and no other)."""
    attention_output: bool
    """Bias on the projection from the heads back to `dim`."""
    mlp: bool
    """Biases on the feed-forward projections."""


class InitConfig(Section):
    std: Annotated[float, Field(gt=0)]
    """Standard deviation of the normal distribution that every matrix of the layers starts from."""
    embedding_std: Annotated[float, Field(gt=0)]
    """The same for the embedding table (and so for the head, where the two are tied)."""
    head_std: Annotated[float, Field(ge=0)]
    """The same for a head of its own; 0 starts with every token equally likely."""
    output: Literal["scaled", "zero", "plain"]
    """Projections back into the residual stream: `scaled` divides std by sqrt(2 num_layers), `zero` starts each block
    as the identity, `plain` uses std."""


class RopeConfig(Section):
    theta: Annotated[float, Field(gt=1)]
    """Base of the rotary frequencies."""
    fraction: Annotated[float, Field(ge=0, le=1)]
    """Share of each head that is rotated; 0 turns rotary positions off."""


class WindowConfig(Section):
    size: Count
    """Tokens that a position of a short layer attends to, itself included."""
    pattern: Annotated[str, Field(pattern="^[SL]+$")]
    """Short (S) and long (L) layers, repeated over the depth; long ones see everything, and so does the last layer."""


class ModelConfig(Section):
    num_layers: Count
    """Transformer blocks."""
    dim: Count
    """Width of the residual stream."""
    num_heads: Count
    """Query heads."""
    num_kv_heads: Count
    """Key and value heads; fewer than num_heads is grouped-query attention."""
    head_dim: Annotated[int, Field(ge=2, multiple_of=2)]
    """Width of one head."""
    mlp_dim: Count
    """Hidden width of the feed-forward network."""
    vocab_size: Count
    """Token ids that the model knows; at least as many as the tokenizer has."""
    vocab_multiple_of: Count
    """The embedding table is padded to a multiple of this many rows (64 suits GPUs); padded ids are never sampled."""
    max_sequence_length: Count
    """Positions that the rotary table holds: the longest sequence, prompt and answer together."""
    activation: Activation
    """Feed-forward nonlinearity; swiglu, geglu and reglu are gated (three matrices), the others not (two)."""
    norm: NormConfig
    """Normalisation before each sublayer and before the head."""
    qk_norm: bool
    """Normalise queries and keys, per head, before they are rotated (with norm.learned as Qwen3 does)."""
    attention_scale: Annotated[float, Field(gt=0)]
    """Factor on the attention logits beside 1 / sqrt(head_dim); above 1 lets normalised queries and keys be sharper."""
    window: WindowConfig | None
    """Layers that see only the newest tokens; null: none does."""
    value_embeddings: bool
    """Every other layer, the last one included, adds a table's vector of the token at hand to its values, times a gate
    (arXiv:2410.17897, as nanochat does it). Parameters, but hardly any computation."""
    residual_scalars: bool
    """Each layer reads a * stream + b * embedding, with learned numbers a (from 1) and b (from 0)."""
    normalize_embedding: bool
    """Normalise the embedding before the first layer."""
    bias: BiasConfig
    """Which projections have biases."""
    tied_embeddings: bool
    """Use the embedding table as the output head too."""
    dropout: Fraction
    """Probability of dropping a value of the embedding, an attention weight or a sublayer's output; off in
    evaluation."""
    softcap: Annotated[float, Field(gt=0)] | None
    """Logits become softcap * tanh(logits / softcap); null leaves them as they are."""
    init: InitConfig
    """Where the weights start from."""
    rope: RopeConfig
    """Rotary positions."""

    @pydantic.model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        return self

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table."""
        return -(-self.vocab_size // self.vocab_multiple_of) * self.vocab_multiple_of

    def matrix_inputs(self) -> dict[str, int]:
        """Columns of every kind of matrix: of a block by its name there, of tables the width of their vectors."""
        inside = {
            "attention.qkv": self.dim,
            "attention.output": self.num_heads * self.head_dim,
            "mlp.gate_up" if self.activation in GATED else "mlp.up": self.dim,
            "mlp.down": self.mlp_dim,
        }
        if self.value_embeddings:
            inside |= {
                "attention.value_embedding": self.num_kv_heads * self.head_dim,
                "attention.value_gate": self.dim,
            }
        return {"embedding": self.dim, **inside, **({} if self.tied_embeddings else {"head": self.dim})}

    def window_of(self, layer: int) -> int | None:
        """Tokens that layer `layer`, counted from 0, attends to; None for all."""
        if self.window is None or layer == self.num_layers - 1:
            return None
        return self.window.size if self.window.pattern[layer % len(self.window.pattern)] == "S" else None

    def has_value_embedding(self, layer: int) -> bool:
        """Whether layer `layer`, counted from 0, has a value embedding."""
        return self.value_embeddings and (self.num_layers - 1 - layer) % 2 == 0
