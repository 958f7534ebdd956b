"""Configuration of a run's data: tokenizer, packing and mixing; sources and formats have their own config files."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

from pretune.core.config import MAY_DIFFER, Count, FilePath, Section
from pretune.data.formats.config import ChatFormat, FormatConfig, chat_format
from pretune.data.sources.config import SourceConfig, ValidationConfig

AddTokens = tuple[str, ...] | Literal["template"]


class TokenizerBase(Section):
    add_tokens: AddTokens
    """Special tokens to append to the tokenizer, with the ids after its last; `template`: those that a chat template
    of data.format writes and the tokenizer lacks. The model that the run starts from grows by their rows."""

    @pydantic.model_validator(mode="after")
    def _tokens_are_new(self) -> Self:
        given = () if self.add_tokens == "template" else self.add_tokens
        if blank := next((one for one in given if not one.strip()), None):
            raise ValueError(f"add_tokens has a token of white space alone ({blank!r}): leave it out")
        if "" in given:
            raise ValueError("add_tokens has an empty token: leave it out")
        if twice := next((one for one in given if given.count(one) > 1), None):
            raise ValueError(f"add_tokens names {twice} twice: once is enough")
        return self


class FileTokenizer(TokenizerBase):
    kind: Literal["file"]
    """A local tokenizer.json, or the tokenizer of a model's folder."""
    path: FilePath
    """The file, or a folder: the tokenizer is read from all files that a model has for it, and all tokens that end a
    text for that model end one here."""
    eos: str | None
    """Text of the token that ends a document; null reads it from tokenizer_config.json or the files beside it."""


class HubTokenizer(TokenizerBase):
    kind: Literal["hub"]
    """The tokenizer of a model on the Hugging Face hub."""
    path: str
    """`owner/name` on the hub."""
    eos: str
    """Text of the token that ends a document."""


class TrainedTokenizer(TokenizerBase):
    kind: Literal["trained"]
    """Byte-level BPE, trained on the source's own text and kept in the cache."""
    vocab_size: Annotated[int, Field(ge=257)]
    """Number of tokens, including the 256 bytes and the end-of-document token."""
    max_bytes: Count
    """Bytes of text to train on, from the start of the source."""
    split_digits: bool
    """Make every digit a separate token, which makes arithmetic easier to learn."""


class InheritedTokenizer(TokenizerBase):
    kind: Literal["inherited"]
    """The tokenizer of the run or model that stage.init_from names."""


TokenizerConfig = Annotated[
    FileTokenizer | HubTokenizer | TrainedTokenizer | InheritedTokenizer, Field(discriminator="kind")
]


class PackingConfig(Section):
    mode: Literal["stream", "documents", "pairs", "none"]
    """stream: documents concatenated and cut every sequence_length tokens, no padding; documents: whole documents
    packed by best fit, little padding; pairs: the same with both sides of each preference pair in one sequence; none:
    one document per sequence, padded."""
    too_long: Literal["cut", "split", "drop"]
    """What to do with a document or pair longer than a sequence (no effect with mode stream): cut keeps its start (for
    a pair, the start of each side, half a sequence each), split spreads it over several (not for pairs), drop leaves
    it out."""
    isolate: bool
    """No position attends to another document in its sequence, and positions restart at each document."""

    @pydantic.model_validator(mode="after")
    def _pairs_stay_whole(self) -> Self:
        if self.mode == "pairs" and not self.isolate:
            raise ValueError("isolate must be true for mode = pairs: one side must not see the other")
        if self.mode == "pairs" and self.too_long == "split":
            raise ValueError("too_long = split would separate the sides of a pair: use drop or cut for mode = pairs")
        return self


class MixConfig(Section):
    """Another data set mixed into training, such as pretraining text to reduce forgetting."""

    share: Annotated[float, Field(ge=0.001, lt=1)]
    """Fraction of the sequences, and so of the tokens, that training reads from it; rounded to a thousandth."""
    source: SourceConfig
    """Where its rows come from; same keys as data.source."""
    validation: ValidationConfig
    """Which of its rows are held out; same keys as data.validation. Their loss is val_NAME/loss."""
    format: FormatConfig
    """How its rows become text; same keys as data.format."""
    packing: PackingConfig
    """How its documents are packed into sequences; same keys as data.packing."""


class DataConfig(Section):
    source: SourceConfig
    """Where rows come from."""
    validation: ValidationConfig
    """Which rows are held out."""
    format: FormatConfig
    """How a row becomes text, and which parts of it are scored."""
    tokenizer: TokenizerConfig
    """How text becomes token ids."""
    sequence_length: Annotated[int, Field(ge=2)]
    """Number of tokens in a sequence."""
    packing: PackingConfig
    """How documents are packed into sequences."""
    mix: dict[Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")], MixConfig]
    """Other data sets to mix in, by name; the remaining sequences come from data.source."""
    shuffle: bool
    """Read sequences in a new random order each epoch."""
    num_workers: Annotated[Count | None, MAY_DIFFER]
    """Number of tokenizing threads; null uses every core."""

    @pydantic.model_validator(mode="after")
    def _something_is_left_for_the_source(self) -> Self:
        total = sum(part.share for part in self.mix.values())
        if total > 0.999:
            raise ValueError(f"the shares in mix sum to {total:g}, which leaves nothing for source; lower them")
        return self

    @pydantic.model_validator(mode="after")
    def _added_tokens_have_a_template(self) -> Self:
        if self.tokenizer.add_tokens == "template" and not self.chats:
            raise ValueError(
                f"tokenizer.add_tokens = template, but format.kind = {self.format.kind} has no chat template: list the "
                "tokens, or leave add_tokens empty ([])"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _preferences_are_packed_as_pairs(self) -> Self:
        for part in (self, *self.mix.values()):
            if part.format.has_pairs != (part.packing.mode == "pairs"):
                raise ValueError(
                    f"format.kind = {part.format.kind} with packing.mode = {part.packing.mode}: format preference "
                    "needs packing.mode pairs, and no other format works with it"
                )
            if self.mix and part.format.has_pairs:
                raise ValueError("preferences have their own loss and cannot be mixed with other data: data/mix=none")
        return self

    @property
    def chats(self) -> list[ChatFormat]:
        """The formats with a chat template, of the data and of what is mixed in."""
        found = (chat_format(part.format) for part in (self, *self.mix.values()))
        return [chat for chat in found if chat is not None]

    def part(self, name: str) -> DataConfig:
        """The data section of one mixed-in set, including the keys that all sets share."""
        part = self.mix[name]
        own = {"source": part.source, "validation": part.validation, "format": part.format, "packing": part.packing}
        return self.model_copy(update={**own, "mix": {}})
