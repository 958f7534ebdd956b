"""Sources, formats, tokenizer and packing, as YAML says them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

import pydantic
from pydantic import Field

from pretune.core.config import MAY_DIFFER, Count, Section


class HubSource(Section):
    kind: Literal["hub"]
    """A dataset of the Hugging Face hub."""
    path: str
    """`owner/name` on the hub."""
    name: str | None
    """Configuration (subset) of the dataset; null is its default."""
    revision: str | None
    """Branch, tag or commit; null is the main branch."""
    split: str
    """Split to read, such as `train` or `train[:1%]`."""
    streaming: bool
    """Read while downloading and stop when max_rows is reached, instead of downloading the whole split first."""
    max_rows: Count | None
    """Stop after this many rows; null reads all."""


class FilesSource(Section):
    kind: Literal["files"]
    """Files of this machine, through `datasets`; .gz, .xz, .bz2 and .zst are read as they are."""
    files: Annotated[tuple[str, ...], Field(min_length=1)]
    """Paths or globs, relative to the working directory."""
    format: Literal["auto", "json", "parquet", "text"]
    """json reads arrays of records and JSON lines; text makes rows {text, source} of about 16,000 characters at most;
    auto goes by the file's name."""
    max_rows: Count | None
    """Stop after this many rows; null reads all."""


class PythonDocsSource(Section):
    kind: Literal["python_docs"]
    """Documentation and docstrings that ship with this Python and its installed packages; needs no network."""
    packages: tuple[str, ...] | None
    """Only these distributions (the standard library is named `python`); null reads all."""
    max_bytes: Count | None
    """Stop after this much text; null reads all."""


class WordProblemsSource(Section):
    kind: Literal["word_problems"]
    """Generated multiple-choice arithmetic in MathQA's fields; needs no network."""
    num_problems: Count
    """How many different problems."""
    max_number: Annotated[int, Field(ge=5)]
    """Largest number in a problem's text."""
    seed: int
    """Same seed, same problems."""


SourceConfig = Annotated[HubSource | FilesSource | PythonDocsSource | WordProblemsSource, Field(discriminator="kind")]


class ValidationConfig(Section):
    """Rows that training never sees: a share of the source, or a source of their own."""

    source: SourceConfig | None
    """A source of its own, or null."""
    fraction: Annotated[float, Field(gt=0, lt=1)] | None
    """Share of the source's rows that is kept out of training, or null."""
    seed: int
    """Which rows the fraction picks."""
    group_by: str | None
    """A column whose equal values stay on one side, such as the prompt that several pairs of answers share; null
    splits row by row."""

    @pydantic.model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.source is None) == (self.fraction is None):
            raise ValueError("set exactly one of source and fraction (and the other to null)")
        return self


class FormatBase(Section):
    """How a row becomes text, and what can be measured with it."""

    has_pairs: ClassVar[bool] = False
    """Whether a row is two answers to one prompt, the better one first."""
    has_answers: ClassVar[bool] = False
    """Whether a generated answer can be told right from wrong."""

    @property
    def has_options(self) -> bool:
        """Whether the likelihood of options can be compared straight after the prompt."""
        return False


class TextFormat(FormatBase):
    kind: Literal["text"]
    """One column of plain text; everything is scored."""
    column: str
    """Name of the column."""


class MathQAFormat(FormatBase):
    kind: Literal["mathqa"]
    """Multiple-choice problems with Problem, Rationale, options, correct."""
    has_answers = True
    options: bool
    """List the five options in the prompt."""
    rationale: Literal["none", "after", "before"]
    """Leave the rationale out, or put it after or before the answer."""
    score_prompt: bool
    """Score the prompt's tokens too, not only the answer's."""

    @property
    def has_options(self) -> bool:
        return self.rationale != "before"


class InstructionFormat(FormatBase):
    kind: Literal["instruction"]
    """Alpaca's instruction, input (may be empty) and output."""
    preamble: bool
    """Begin with the sentence of Alpaca's published prompt; without it a record is about a fifth shorter."""
    score_prompt: bool
    """Score the prompt's tokens too, not only the output's."""


class PromptCompletionFormat(FormatBase):
    kind: Literal["prompt_completion"]
    """A column with what the model is given and one with what it is to write after it."""
    prompt: str
    """Name of the prompt's column. Spaces at its end are moved to the completion, where tokenizers want them."""
    completion: str
    """Name of the completion's column."""
    score_prompt: bool
    """Score the prompt's tokens too, not only the completion's."""


class GSM8KFormat(FormatBase):
    kind: Literal["gsm8k"]
    """Grade-school problems: question, and an answer that ends in a line `#### number`."""
    has_answers = True
    calculations: bool
    """Keep the answer's notes for a calculator, such as <<48/2=24>>."""
    score_prompt: bool
    """Score the question's tokens too, not only the answer's."""


Role = Literal["system", "user", "assistant", "tool"]


class ChatFormat(FormatBase):
    kind: Literal["chat"]
    """Conversations, written out by the tokenizer's chat template. The assistant's turns are scored, each with the
    token that ends it."""
    columns: Annotated[tuple[str, ...], Field(min_length=1)]
    """Columns that may hold the list of messages; a row's first that is there is read."""
    role_keys: Annotated[tuple[str, ...], Field(min_length=1)]
    """Keys of a message that may hold its role."""
    content_keys: Annotated[tuple[str, ...], Field(min_length=1)]
    """Keys of a message that may hold its text."""
    roles: dict[str, Role]
    """What the data calls each role; a role that is not listed is an error."""
    template: str | None
    """The chat template, in Jinja; null takes the tokenizer's own."""
    variables: dict[str, str | int | bool]
    """What the template is given beside messages, such as enable_thinking or date_string."""
    assistant_turns: Literal["together", "apart", "last"]
    """Score all turns of the assistant in one document; or make a document for each turn, which alone is scored, for
    templates that change earlier turns (such as those that drop thinking); or score the last turn only."""


class PreferenceFormat(FormatBase):
    kind: Literal["preference"]
    """Pairs of answers to one prompt: prompt, chosen and rejected as texts or lists of messages; without a prompt, what
    chosen and rejected begin with alike."""
    has_pairs = True
    template: Annotated[InstructionFormat | PromptCompletionFormat | ChatFormat, Field(discriminator="kind")]
    """How a prompt and one of its answers are written: the format of the instruction tuning before."""

    @pydantic.model_validator(mode="after")
    def _only_the_answer_is_scored(self) -> Self:
        if isinstance(self.template, ChatFormat):
            if self.template.assistant_turns != "last":
                raise ValueError("template.assistant_turns must be last: the sides differ in their last turn")
        elif self.template.score_prompt:
            raise ValueError("template.score_prompt must be false: both sides have the same prompt")
        return self


FormatConfig = Annotated[
    TextFormat
    | MathQAFormat
    | InstructionFormat
    | PromptCompletionFormat
    | GSM8KFormat
    | ChatFormat
    | PreferenceFormat,
    Field(discriminator="kind"),
]


def chat_format(format: FormatConfig) -> ChatFormat | None:
    """The chat format that a format is or writes its answers in, if there is one."""
    inner = format.template if isinstance(format, PreferenceFormat) else format
    return inner if isinstance(inner, ChatFormat) else None


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
