"""Configuration of adapters."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

import pydantic
from pydantic import Field

from pretune.core.config import FilePath, Section

VOCABULARY = ("embedding", "head")
"""Targets outside the blocks, with a row per token of the vocabulary."""


Trained = Literal["none", "new_rows", "all"]


class NoAdapterConfig(Section):
    kind: Literal["none"]
    """All parameters of the model are trained."""
    freezes: ClassVar[bool] = False
    dropout_reads_weights: ClassVar[bool] = False
    """Whether the model's own weights are frozen."""
    starts_at_zero: ClassVar[bool] = False
    """Whether disabling the adapter gives the initial model."""
    dropout: ClassVar[float] = 0.0
    adapts_vocabulary: ClassVar[bool] = False
    """Whether it is on the embedding or the head."""

    def trained_embeddings(self, adds_tokens: bool) -> Trained:
        """What is trained beside an adapter: there is none."""
        return "none"


class AdapterBase(Section):
    rank: Annotated[int, Field(ge=1, le=2**17)]
    """Rank of the factors that form an update."""
    alpha: Annotated[float, Field(gt=0)]
    """Updates are multiplied by alpha / rank."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    """The layers to adapt: roles (`attention`, `mlp`, `all`: the linear layers of the blocks), or names such as
    `attention.output` (in every block) and `layers.0.mlp.down` (in one block); for adapter=lora also `embedding` and
    `head`, which are one matrix in a tied model, adapted as one."""
    train_embeddings: Trained | Literal["auto"]
    """What of the embedding and the head is trained beside the adapter, with all its values: the rows of the tokens
    that data.tokenizer.add_tokens appends (new_rows), all, or none. auto: new_rows if there are any and the adapter
    itself is not on the embedding or the head, else none."""
    init_from: FilePath | None
    """Adapter to start from: a run's name or folder, or a folder with peft's files, also of the model of transformers
    that stage.init_from names; null starts a new one."""
    freezes: ClassVar[bool] = True
    dropout_reads_weights: ClassVar[bool] = False
    """Whether dropout needs the frozen weights in full precision."""

    @property
    def starts_at_zero(self) -> bool:
        return self.init_from is None

    @property
    def adapts_vocabulary(self) -> bool:
        return any(target in VOCABULARY for target in self.targets)

    def trained_embeddings(self, adds_tokens: bool) -> Trained:
        """What is trained beside the adapter of a run that adds tokens, or none."""
        if self.train_embeddings != "auto":
            return self.train_embeddings
        return "new_rows" if adds_tokens and not self.adapts_vocabulary else "none"


class LoraBase(AdapterBase):
    dropout: Annotated[float, Field(ge=0, lt=1)]
    """Dropout probability for the adapter's inputs (not those of the frozen layer); off in evaluation."""
    rslora: bool
    """Multiply updates by alpha / sqrt(rank) instead (arXiv 2312.03732), which suits ranks of 32 and more."""
    lr_ratio: Annotated[float, Field(ge=1)]
    """LoRA+ (arXiv 2402.12354): the learning rate of the second factor relative to the first; 1 is plain LoRA."""


class LoraConfig(LoraBase):
    kind: Literal["lora"]
    """A product of two low-rank matrices is added to each target's weight (arXiv 2106.09685)."""
    init: Literal["zero", "gaussian", "pissa", "orthogonal"]
    """zero and gaussian start with no update; orthogonal too, but with both factors nonzero (needs an even rank); pissa
    moves the principal components of the weights into the adapter and trains them (arXiv 2404.02948)."""

    @pydantic.model_validator(mode="after")
    def _vocabulary_is_plain(self) -> Self:
        if self.adapts_vocabulary and (self.dropout or self.init not in ("zero", "gaussian")):
            raise ValueError("targets embedding and head need dropout = 0 and init = zero or gaussian")
        return self

    @pydantic.model_validator(mode="after")
    def _rank_is_even(self) -> Self:
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(f"init = orthogonal splits the rank into halves: {self.rank} is odd, use an even rank")
        return self

    @property
    def starts_at_zero(self) -> bool:
        return super().starts_at_zero and self.init != "pissa"


class DoraConfig(LoraBase):
    kind: Literal["dora"]
    """LoRA for the direction of each weight row, with a separately trained magnitude (arXiv 2402.09353)."""
    dropout_reads_weights = True
    init: Literal["zero", "gaussian"]
    """Initialization of the first factor; the second is zero, so that there is no update at the start."""


class LycorisBase(AdapterBase):
    dropout: Annotated[float, Field(ge=0, lt=1)]
    """Dropout probability for the adapter's outputs (rows of the update); off in evaluation."""


class LohaConfig(LycorisBase):
    kind: Literal["loha"]
    """The elementwise product of two low-rank matrices, which has rank `rank` squared (arXiv 2108.06098)."""


class LokrConfig(LycorisBase):
    kind: Literal["lokr"]
    """The Kronecker product of a small matrix and a low-rank matrix (arXiv 2309.14859)."""
    factor: Annotated[int, Field(ge=2)] | None
    """Maximum number of rows and columns of the small matrix; null takes the divisors of the layer's widths that are
    nearest to their square roots."""


TrainedAdapterConfig = LoraConfig | DoraConfig | LohaConfig | LokrConfig
AdapterConfig = Annotated[NoAdapterConfig | TrainedAdapterConfig, Field(discriminator="kind")]
