"""Configuration of data sources and of the held-out rows."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

from pretune.core.config import MAY_DIFFER, Count, FilePath, Section


class HubSource(Section):
    kind: Literal["hub"]
    """A dataset on the Hugging Face hub."""
    path: str
    """`owner/name` on the hub."""
    name: str | None
    """Configuration (subset) of the dataset; null is its default."""
    revision: str | None
    """Branch, tag or commit; null is the main branch."""
    split: str
    """Split to read, such as `train` or `train[:1%]`."""
    streaming: bool
    """Read while downloading and stop at max_rows, instead of downloading the whole split first."""
    max_rows: Count | None
    """Stop after this many rows; null reads all."""


class FilesSource(Section):
    kind: Literal["files"]
    """Local files; what is compressed (.gz, .xz, .bz2, .zst) is decompressed on the fly."""
    files: Annotated[tuple[FilePath, ...], Field(min_length=1), MAY_DIFFER]
    """Paths or globs, relative to the working directory."""
    format: Literal["auto", "json", "parquet", "csv", "text"]
    """json reads JSON lines and arrays of records; csv wants the columns' names in the first line (.tsv: separated by
    tabs); text gives rows {text, source} of at most about 16,000 characters; auto decides by the file's name."""
    max_rows: Count | None
    """Stop after this many rows; null reads all."""


class PythonDocsSource(Section):
    kind: Literal["python_docs"]
    """Documentation and docstrings of this Python installation and its packages; needs no network."""
    packages: tuple[str, ...] | None
    """Only these distributions (`python` is the standard library); null reads all."""
    max_bytes: Count | None
    """Stop after this many bytes of text; null reads all."""


class WordProblemsSource(Section):
    kind: Literal["word_problems"]
    """Generated multiple-choice arithmetic problems with MathQA's fields; needs no network."""
    num_problems: Count
    """Number of different problems."""
    max_number: Annotated[int, Field(ge=5)]
    """Largest number in a problem's text."""
    seed: int
    """Random seed: the same seed gives the same problems."""


TextSource = Annotated[HubSource | FilesSource | PythonDocsSource, Field(discriminator="kind")]
"""Sources whose rows are texts."""


class LongTaskSource(Section):
    kind: Literal["long_task"]
    """Generated tasks whose answer lies far back in a long text."""
    task: Literal["passkey", "many_keys", "instruction_then_distraction"]
    """passkey: a number is said once, somewhere in the text, and asked for at its end; many_keys: many names have a
    number each, said all over the text, and one is asked for; instruction_then_distraction: an instruction comes first,
    others that are not to be followed come later, and the end asks for the answer."""
    text: TextSource
    """The text around; it begins again where it is used up."""
    column: str
    """The column of that source with the text."""
    num_examples: Count
    """Number of examples."""
    min_length: Annotated[int, Field(ge=64)]
    """Tokens of the shortest prompts, by the run's own tokenizer. Each length between the two is equally likely."""
    max_length: Annotated[int, Field(ge=64)]
    """Tokens of the longest prompts. The answer comes on top."""
    min_depth: Annotated[float, Field(ge=0, le=1)]
    """Where what is asked for lies, as a share of the text: 0 at its start. Each depth between the two is equally
    likely; many_keys spreads its other names evenly."""
    max_depth: Annotated[float, Field(ge=0, le=1)]
    """The deepest place."""
    digits: Annotated[int, Field(ge=1, le=32)]
    """Digits of a number."""
    num_keys: Annotated[int, Field(ge=2, le=1000)]
    """Names in an example of many_keys."""
    seed: int
    """Random seed: the same seed gives the same examples."""

    @pydantic.model_validator(mode="after")
    def _in_order(self) -> Self:
        for low, high in (("min_length", "max_length"), ("min_depth", "max_depth")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} ({getattr(self, low)}) is larger than {high} ({getattr(self, high)})")
        return self


class ArcSource(Section):
    kind: Literal["arc"]
    """Tasks of the Abstraction and Reasoning Corpus, from local JSON files."""
    files: Annotated[tuple[FilePath, ...], Field(min_length=1), MAY_DIFFER]
    """Folders with a file for each task, files with one task or with many by their ids, or globs, relative to the
    working directory."""
    solutions: FilePath | None
    """File with the outputs of the tests by their tasks' ids, where they are not in `files`; null if they are."""


class GridPuzzlesSource(Section):
    kind: Literal["grid_puzzles"]
    """Generated tasks of small grids, with ARC's fields; needs no network."""
    num_tasks: Count
    """Number of different tasks."""
    num_pairs: Count
    """Number of pairs that a task shows before its test."""
    min_size: Count
    """Smallest number of rows and of columns of an input."""
    max_size: Annotated[int, Field(ge=2, le=30)]
    """Largest number of rows and of columns of an input; an output may have twice as many."""
    num_colors: Annotated[int, Field(ge=2, le=8)]
    """Number of colours of a task's inputs, besides the background."""
    seed: int
    """Random seed: the same seed gives the same tasks."""

    @pydantic.model_validator(mode="after")
    def _sizes_are_a_range(self) -> Self:
        if self.min_size > self.max_size:
            raise ValueError(f"min_size ({self.min_size}) is larger than max_size ({self.max_size}): lower it")
        return self


SourceConfig = Annotated[
    HubSource | FilesSource | PythonDocsSource | WordProblemsSource | ArcSource | GridPuzzlesSource | LongTaskSource,
    Field(discriminator="kind"),
]


class ValidationConfig(Section):
    """Held-out rows, which training never sees: a fraction of the source, or a separate source."""

    source: SourceConfig | None
    """A separate source, or null."""
    fraction: Annotated[float, Field(gt=0, lt=1)] | None
    """Fraction of the source's rows that is held out, or null. A row's content decides: equal rows are on one side, and
    no row changes its side when others are added."""
    seed: int
    """Random seed for choosing the held-out rows."""
    group_by: str | None
    """A column whose equal values stay on one side, such as the prompt shared by several pairs of answers; null splits
    by all that the format reads."""

    @pydantic.model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.source is None) == (self.fraction is None):
            raise ValueError("set exactly one of source and fraction (and the other to null)")
        return self
