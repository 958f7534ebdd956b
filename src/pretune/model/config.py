"""Configuration of the transformer's shape."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

import pydantic
from pydantic import Field

from pretune.core.config import Count, Fraction, Section
from pretune.model.rope_config import RopeConfig

Activation = Literal["swiglu", "geglu", "reglu", "relu_squared", "gelu", "silu", "relu"]
GATED: frozenset[str] = frozenset({"swiglu", "geglu", "reglu"})
"""Activations that multiply two projections; the others apply a function to one."""

Width = Annotated[int, Field(ge=1, le=2**20)]
"""A size of a matrix, within what tensors can be indexed with."""


class NormConfig(Section):
    kind: Literal["rmsnorm", "layernorm"]
    """rmsnorm or layernorm (which also centers); both are computed in float32."""
    learned: bool
    """Whether norms have learned weights: a scale, and for layernorm also a shift."""
    offset: Literal[0, 1]
    """Norms multiply by offset + weight. With 1, weights start at 0, and weight decay pulls the scale to 1 (Gemma)."""
    placement: Literal["before", "after", "both"]
    """Where a sublayer has its norm: on what it reads (before), on what it adds to the residual stream (after: OLMo 2),
    or one on each (both: Gemma 2)."""
    eps: Annotated[float, Field(gt=0)]
    """Added to the mean square (or the variance) before taking the root."""


class BiasConfig(Section):
    qkv: bool
    """Biases on the query, key and value projections (Qwen2 has only these)."""
    attention_output: bool
    """Bias on the projection from the heads back to `dim`."""
    mlp: bool
    """Biases on the feed-forward projections."""


class InitConfig(Section):
    std: Annotated[float, Field(gt=0)]
    """Standard deviation of the normal distribution that initializes every matrix inside the layers."""
    embedding_std: Annotated[float, Field(gt=0)]
    """The same for the embedding table (and so for a tied head)."""
    head_std: Annotated[float, Field(ge=0)]
    """The same for an untied head; with 0, all tokens are equally likely at the start."""
    output: Literal["scaled", "zero", "plain"]
    """Projections back into the residual stream: `scaled` divides std by sqrt(2 num_layers), `zero` starts each block
    as the identity, `plain` uses std."""


class WindowConfig(Section):
    size: Count
    """Number of tokens that a position in a short layer attends to, including itself."""
    pattern: Annotated[str, Field(pattern="^[SL]+$")]
    """Pattern of short (S) and long (L) layers, repeated over the depth; long layers attend to all previous tokens."""
    full_last_layer: bool
    """Whether the last layer is long whatever the pattern says (nanochat); false follows the pattern (Mistral)."""


Architecture = Literal[
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "olmo2", "gemma", "gemma2", "gemma3_text", "arcee",
    "apertus", "nanochat", "gpt2"
]  # fmt: skip


class ModelConfig(Section):
    tag: ClassVar[str] = "own"
    architecture: Architecture | None
    """Family of transformers that exports are written as, by its model_type; a model of others has its own. null: one
    that fits is chosen (docs/how-to/export.md)."""
    num_layers: Annotated[int, Field(ge=1, le=1024)]
    """Number of transformer blocks."""
    dim: Width
    """Width of the residual stream."""
    num_heads: Annotated[int, Field(ge=1, le=4096)]
    """Number of query heads."""
    num_kv_heads: Count
    """Number of key and value heads; fewer than num_heads is grouped-query attention."""
    head_dim: Annotated[int, Field(ge=2, le=2**17, multiple_of=2)]
    """Width of one head."""
    mlp_dim: Width
    """Hidden width of the feed-forward network."""
    vocab_size: Annotated[int, Field(ge=1, le=2**24)]
    """Number of token ids; at least as many as the tokenizer has."""
    vocab_multiple_of: Width
    """The embedding table is padded to a multiple of this many rows (64 suits GPUs); padded ids are never sampled."""
    max_sequence_length: Annotated[int, Field(ge=1, le=2**20)]
    """Number of positions: the longest sequence, prompt and answer together."""
    activation: Activation
    """Feed-forward activation; swiglu, geglu and reglu are gated (three matrices), the others are not (two)."""
    norm: NormConfig
    """Normalization of each sublayer and before the head."""
    qk_norm: bool
    """Normalize queries and keys before they are rotated (as in Qwen3 if norm.learned)."""
    qk_norm_over: Literal["head", "all_heads"]
    """What qk_norm takes the mean over: each head on its own, or all heads of a token at once (OLMo 2)."""
    attention_scale: Annotated[float, Field(gt=0)]
    """Extra factor on the attention logits besides 1 / sqrt(head_dim); above 1 sharpens attention with qk_norm."""
    attention_softcap: Annotated[float, Field(gt=0)] | None
    """Attention logits become softcap * tanh(logits / softcap) before they are masked (Gemma 2); null leaves them
    unchanged. Outside of compiled code on CUDA this computes the logits of all pairs of tokens."""
    window: WindowConfig | None
    """Sliding-window attention in some layers; null: in none."""
    value_embeddings: bool
    """Every other layer, including the last, adds a gated value embedding of the current token to its values
    (arXiv:2410.17897, as in nanochat). This adds parameters but hardly any computation."""
    residual_scalars: bool
    """Each layer reads a * stream + b * embedding, with learned scalars a (starting at 1) and b (starting at 0)."""
    learned_positions: bool
    """Add a learned vector for each position to the embedded tokens (GPT-2, with rope.fraction = 0)."""
    normalize_embedding: bool
    """Normalize the embedding before the first layer."""
    scale_embedding: bool
    """Multiply the embedding by sqrt(dim), rounded to the embedding's type, before the first layer (Gemma)."""
    bias: BiasConfig
    """Which projections have biases."""
    tied_embeddings: bool
    """Use the embedding table as the output head too."""
    dropout: Fraction
    """Dropout probability for the embedding, attention weights and sublayer outputs; off in evaluation."""
    softcap: Annotated[float, Field(gt=0)] | None
    """Logits become softcap * tanh(logits / softcap); null leaves them unchanged."""
    init: InitConfig
    """Weight initialization."""
    rope: RopeConfig
    """Rotary positions."""

    @pydantic.model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        return self

    @pydantic.model_validator(mode="after")
    def _positions_can_be_stretched(self) -> Self:
        if (misfit := self.rope.misfit(self.head_dim)) is not None:
            raise ValueError(misfit)
        return self

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table."""
        return -(-self.vocab_size // self.vocab_multiple_of) * self.vocab_multiple_of

    @property
    def qk_norm_sizes(self) -> tuple[int, int]:
        """What the norms of queries and keys are over."""
        if self.qk_norm_over == "head":
            return self.head_dim, self.head_dim
        return self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim

    def matrix_inputs(self) -> dict[str, int]:
        """Columns (inputs) of each kind of matrix, by its name within a block; for tables, the width of a vector."""
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
        tables = ["embedding", "position_embedding"] if self.learned_positions else ["embedding"]
        return {**dict.fromkeys(tables, self.dim), **inside, **({} if self.tied_embeddings else {"head": self.dim})}

    def window_of(self, layer: int) -> int | None:
        """The number of tokens that layer `layer`, counted from 0, attends to; None for all."""
        if self.window is None or (self.window.full_last_layer and layer == self.num_layers - 1):
            return None
        return self.window.size if self.window.pattern[layer % len(self.window.pattern)] == "S" else None

    def is_rotated(self, layer: int) -> bool:
        """Whether layer `layer`, counted from 0, has rotary positions."""
        return self.rope.pattern[layer % len(self.rope.pattern)] == "R"

    def has_value_embedding(self, layer: int) -> bool:
        """Whether layer `layer`, counted from 0, has a value embedding."""
        return self.value_embeddings and (self.num_layers - 1 - layer) % 2 == 0
