"""Tokenizer, packing and the data of a run, as YAML says them; sources and formats have files of their own."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

from pretune.core.config import MAY_DIFFER, Count, Section
from pretune.data.formats.config import FormatConfig
from pretune.data.sources.config import SourceConfig, ValidationConfig


class FileTokenizer(Section):
    kind: Literal["file"]
    """A tokenizer.json of this machine."""
    path: str
    """The file, or the folder that holds it."""
    eos: str | None
    """Text of the token that ends a document; null where a run saved the tokenizer and its eos with it."""


class HubTokenizer(Section):
    kind: Literal["hub"]
    """The tokenizer of a model on the Hugging Face hub."""
    path: str
    """`owner/name` on the hub."""
    eos: str
    """Text of the token that ends a document."""


class TrainedTokenizer(Section):
    kind: Literal["trained"]
    """Byte-level BPE, trained on the spot on the source's own text and kept in the cache."""
    vocab_size: Annotated[int, Field(ge=257)]
    """Tokens, the 256 bytes and the end-of-document token included."""
    max_bytes: Count
    """Text to train on, from the start of the source."""
    split_digits: bool
    """Every digit is a token of its own, which makes arithmetic easier to learn."""


class InheritedTokenizer(Section):
    kind: Literal["inherited"]
    """The tokenizer of the run that stage.init_from names."""


TokenizerConfig = Annotated[
    FileTokenizer | HubTokenizer | TrainedTokenizer | InheritedTokenizer, Field(discriminator="kind")
]


class PackingConfig(Section):
    mode: Literal["stream", "documents", "pairs", "none"]
    """stream: documents joined and cut every sequence_length tokens, nothing padded; documents: whole documents, best
    fit, hardly anything padded; pairs: the same with both sides of each preference in one row; none: one document a
    row, padded."""
    too_long: Literal["cut", "split", "drop"]
    """A document, or a pair, longer than a row, unless mode is stream: keep its start (of a pair: of its sides, half a
    row for each), spread it over rows (not a pair), or leave it out."""
    isolate: bool
    """No position attends to another document of its row, and positions restart with each document."""

    @pydantic.model_validator(mode="after")
    def _pairs_stay_whole(self) -> Self:
        if self.mode == "pairs" and not self.isolate:
            raise ValueError("isolate must be true for mode = pairs: one side must not see the other")
        if self.mode == "pairs" and self.too_long == "split":
            raise ValueError("too_long = split tears pairs apart: take drop or cut for mode = pairs")
        return self


class MixConfig(Section):
    """Another set of documents in the training set, such as texts of pretraining against forgetting."""

    share: Annotated[float, Field(ge=0.001, lt=1)]
    """Share of the rows, and so of the tokens, that training reads of it; rounded to a thousandth."""
    source: SourceConfig
    """Where its rows come from, in the keys of data.source."""
    validation: ValidationConfig
    """Which of its rows are held out, in the keys of data.validation; their loss is val_NAME/loss."""
    format: FormatConfig
    """How its rows become text, in the keys of data.format."""
    packing: PackingConfig
    """How its documents are laid into rows, in the keys of data.packing."""


class DataConfig(Section):
    source: SourceConfig
    """Where rows come from."""
    validation: ValidationConfig
    """Which rows are held out."""
    format: FormatConfig
    """How a row becomes text, and which of it is scored."""
    tokenizer: TokenizerConfig
    """How text becomes token ids."""
    sequence_length: Annotated[int, Field(ge=2)]
    """Tokens in a row."""
    packing: PackingConfig
    """How documents are laid into rows."""
    mix: dict[Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")], MixConfig]
    """Other sets of documents to read in the same run, by name; the rest of the rows are data.source's."""
    shuffle: bool
    """Draw rows in a new order each epoch."""
    num_workers: Annotated[Count | None, MAY_DIFFER]
    """Threads that tokenize; null uses every core."""

    @pydantic.model_validator(mode="after")
    def _something_is_left_for_the_source(self) -> Self:
        total = sum(part.share for part in self.mix.values())
        if total > 0.999:
            raise ValueError(f"the shares in mix come to {total:g}, which leaves nothing for source; lower them")
        return self

    @pydantic.model_validator(mode="after")
    def _preferences_are_packed_as_pairs(self) -> Self:
        for part in (self, *self.mix.values()):
            if (part.format.kind == "preference") != (part.packing.mode == "pairs"):
                raise ValueError(
                    f"format.kind = {part.format.kind} with packing.mode = {part.packing.mode}: format preference goes "
                    "with packing.mode pairs, and no other format does"
                )
            if self.mix and part.format.kind == "preference":
                raise ValueError("preferences have a loss of their own and mix with nothing else: data/mix=none")
        return self

    def part(self, name: str) -> DataConfig:
        """The data section of one set of the mix, with what all of them share."""
        part = self.mix[name]
        own = {"source": part.source, "validation": part.validation, "format": part.format, "packing": part.packing}
        return self.model_copy(update={**own, "mix": {}})
