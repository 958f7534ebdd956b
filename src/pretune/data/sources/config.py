"""Where rows come from, and which of them are held out, as YAML says it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

from pretune.core.config import Count, Section


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
