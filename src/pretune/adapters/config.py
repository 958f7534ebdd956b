"""Adapters, as YAML says them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

import pydantic
from pydantic import Field

from pretune.core.config import Section


class NoAdapterConfig(Section):
    kind: Literal["none"]
    """All parameters of the model are trained."""
    freezes: ClassVar[bool] = False
    """Whether the model's own weights are left as they are."""
    starts_at_zero: ClassVar[bool] = False
    """Whether there is an adapter without which the model computes what it starts from."""
    dropout: ClassVar[float] = 0.0


class AdapterBase(Section):
    rank: Annotated[int, Field(ge=1, le=2**17)]
    """Inner width of the factors that an update is made of."""
    alpha: Annotated[float, Field(gt=0)]
    """Updates are multiplied by alpha / rank."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    """Which linear layers inside the blocks: roles (`attention`, `mlp`, `all`), or names such as `attention.output` (in
    every block) and `layers.0.mlp.down` (in one)."""
    init_from: str | None
    """Adapter to go on from: a run's name or folder, or a folder with peft's files; null starts a new one."""
    freezes: ClassVar[bool] = True

    @property
    def starts_at_zero(self) -> bool:
        return self.init_from is None


class LoraBase(AdapterBase):
    dropout: Annotated[float, Field(ge=0, lt=1)]
    """Probability of dropping an input of the adapter (not of the frozen layer); off in evaluation."""
    rslora: bool
    """Multiply updates by alpha / sqrt(rank) instead (arXiv 2312.03732), which suits ranks of 32 and more."""
    lr_ratio: Annotated[float, Field(ge=1)]
    """LoRA+ (arXiv 2402.12354): the second factor learns this many times faster than the first; 1 is plain."""


class LoraConfig(LoraBase):
    kind: Literal["lora"]
    """A product of two thin matrices beside each target (arXiv 2106.09685)."""
    init: Literal["zero", "gaussian", "pissa", "orthogonal"]
    """zero and gaussian start from no update; orthogonal too, with both factors at work at once (an even rank); pissa
    takes the strongest directions out of the weights and trains them (arXiv 2404.02948)."""

    @pydantic.model_validator(mode="after")
    def _rank_is_even(self) -> Self:
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(f"init = orthogonal splits the rank into halves: {self.rank} is odd, take an even one")
        return self

    @property
    def starts_at_zero(self) -> bool:
        return super().starts_at_zero and self.init != "pissa"


class DoraConfig(LoraBase):
    kind: Literal["dora"]
    """LoRA for the direction of each row of a weight, and a trained length beside it (arXiv 2402.09353)."""
    init: Literal["zero", "gaussian"]
    """How the first factor starts; the second one is zero, so that there is no update at first."""


class LycorisBase(AdapterBase):
    dropout: Annotated[float, Field(ge=0, lt=1)]
    """Probability of dropping an output of the adapter (a row of the update); off in evaluation."""


class LohaConfig(LycorisBase):
    kind: Literal["loha"]
    """The elementwise product of two low-rank matrices: of rank `rank` squared (arXiv 2108.06098)."""


class LokrConfig(LycorisBase):
    kind: Literal["lokr"]
    """A Kronecker product of a small matrix and a low-rank one (arXiv 2309.14859)."""
    factor: Annotated[int, Field(ge=2)] | None
    """Rows and columns of the small matrix, at most; null takes what is nearest to the root of the layer's widths."""


AdapterConfig = Annotated[
    NoAdapterConfig | LoraConfig | DoraConfig | LohaConfig | LokrConfig, Field(discriminator="kind")
]
