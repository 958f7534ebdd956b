"""Rows of any source, and the split into training and validation rows.

A row is a plain dict. Everything here streams: no source is held in memory as a whole.
"""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import Any, Literal, assert_never

from pretune.core.config import ConfigError, InputError
from pretune.data.config import DataConfig
from pretune.data.hashing import hash_file, hash_value, mix
from pretune.data.sources import arc_files, grid_puzzles, hub, local_files, long_tasks, python_docs, word_problems
from pretune.data.sources.config import (
    ArcSource,
    FilesSource,
    GridPuzzlesSource,
    HubSource,
    LongTaskSource,
    PythonDocsSource,
    SourceConfig,
    WordProblemsSource,
)

Row = dict[str, Any]
Side = Literal["train", "validation"]


def rows(config: SourceConfig, columns: Collection[str] | None = None) -> Iterator[Row]:
    """Every row of a source, always in the same order. Tables may leave out what is not among `columns`, but for their
    first rows, which have all.

    Raises InputError for anything that is missing, unreadable or unreachable.
    """
    match config:
        case HubSource():
            return hub.rows(config)
        case FilesSource():
            return local_files.rows(config, columns)
        case PythonDocsSource():
            return python_docs.rows(config)
        case WordProblemsSource():
            return word_problems.rows(config)
        case LongTaskSource():
            return long_tasks.rows(config, lambda: rows(config.text, {config.column}), describe(config.text))
        case ArcSource():
            return arc_files.rows(config)
        case GridPuzzlesSource():
            return grid_puzzles.rows(config)
        case _:
            assert_never(config)


def describe(config: SourceConfig) -> str:
    """A source's name for error messages."""
    match config:
        case HubSource():
            return f"hub dataset {config.path}" + (f" ({config.name})" if config.name else "") + f", {config.split}"
        case FilesSource():
            return f"files {', '.join(config.files)}"
        case ArcSource():
            return f"tasks {', '.join(config.files)}"
        case LongTaskSource():
            return config.task
        case PythonDocsSource() | WordProblemsSource() | GridPuzzlesSource():
            return config.kind


def locate(config: SourceConfig, row: int) -> str:
    """A row (counted from 0) for error messages; with several files, the row's file and its number there."""
    if isinstance(config, FilesSource):
        return local_files.locate(config, row)
    return f"{describe(config)}, row {row + 1}"


def identity(config: SourceConfig, cache: Path) -> dict[str, Any]:
    """Everything that a source's rows depend on, as JSON-serializable values: the key of caches.

    Files are identified by their content, wherever they are (the folder `cache` remembers it, so that files are not
    read each time); python_docs by the versions of Python and of installed packages. A hub dataset is identified by
    its name and revision: pin the revision if the dataset may change.
    """
    match config:
        case HubSource():
            return config.model_dump(exclude={"streaming"})
        case FilesSource():
            found = local_files.expand(config.files)
            # Of the name, only its endings matter: they say how to read the file.
            files = [("".join(file.suffixes[-2:]), hash_file(file, cache / "files")) for file in found]
            return config.model_dump(exclude={"files"}) | {"files": files}
        case PythonDocsSource():
            versions = {d.name.lower(): d.version for d in python_docs.distributions()}
            found = (
                sorted(versions.items())
                if config.packages is None
                else [(name, versions.get(name)) for name in config.packages]
            )
            return config.model_dump() | {
                "python": platform.python_version(),
                "versions": found,
                "reader": python_docs.VERSION,
            }
        case WordProblemsSource():
            return config.model_dump() | {"generator": word_problems.VERSION}
        case LongTaskSource():
            return config.model_dump() | {"text": identity(config.text, cache), "generator": long_tasks.VERSION}
        case ArcSource():
            known, solutions = cache / "files", config.solutions
            # A file's name is the id of a task that is alone in it.
            files = [(file.name, hash_file(file, known)) for file in arc_files.task_files(config)]
            solved = None if solutions is None else hash_file(local_files.expand((solutions,))[0], known)
            return {"kind": config.kind, "files": files, "solutions": solved}
        case GridPuzzlesSource():
            return config.model_dump() | {"generator": grid_puzzles.VERSION}


def check_apart(config: DataConfig) -> None:
    """Raise ConfigError if any data set's training rows include, by their source, held-out rows of another or its own.

    This finds what can be said before a row is read, whatever the formats; `contamination` compares what is in them.
    """
    sets = {"data": config, **{f"data.mix.{name}": config.part(name) for name in config.mix}}
    for (trained, train), (measured, other) in product(sets.items(), repeat=2):
        held_out = other.validation
        shared = _shared(train.source, held_out.source or other.source)
        if shared is None:
            continue
        if held_out.source is not None:
            raise ConfigError(
                f"{measured}.validation.source has {shared}, and so has {trained}.source: the model would be measured "
                f"on what it was trained on; leave it out of one of the two, or set {measured}.validation.fraction "
                "instead"
            )
        if train.validation.source is not None or Split.of(train) != Split.of(other):
            raise ConfigError(
                f"{trained}.source and {measured}.source both have {shared}, but hold out other rows of it: the model "
                "would be measured on what it was trained on; give both the same validation and, if their formats "
                "read other columns, the same validation.group_by"
            )


def _shared(trained: SourceConfig, measured: SourceConfig) -> str | None:
    """What both sources are sure to read, for error messages; None if there is no such thing."""
    if isinstance(trained, FilesSource) and isinstance(measured, FilesSource):
        files, others = (local_files.expand(source.files) for source in (trained, measured))
        # With max_rows, training may end before a file that comes later.
        return _shared_file(files if trained.max_rows is None else files[:1], others)
    if isinstance(trained, ArcSource) and isinstance(measured, ArcSource):
        return _shared_file(arc_files.task_files(trained), arc_files.task_files(measured))
    same = trained.model_dump(exclude=_AMOUNT) == measured.model_dump(exclude=_AMOUNT)
    return describe(trained) if same else None


def _shared_file(files: list[Path], others: list[Path]) -> str | None:
    known = {file.resolve() for file in others}
    return next((str(file.resolve()) for file in files if file.resolve() in known), None)


_AMOUNT = {"streaming", "max_rows", "max_bytes"}
"""Keys that say how much of a source is read, and how: from its start, in any case."""


def numbered_rows(config: DataConfig, side: Side) -> Iterator[tuple[int, Row]]:
    """The rows of one side with their numbers in the source, from 0.

    Raises InputError if the side is empty, ConfigError if training would read validation data.
    """
    check_apart(config)
    validation = config.validation
    if validation.source is not None:
        chosen = enumerate(rows(side_source(config, side)))
    else:
        split = Split.of(config)
        chosen = ((i, row) for i, row in enumerate(rows(config.source)) if split.side(i, row) == side)
    empty = True
    for numbered in chosen:
        empty = False
        yield numbered
    if empty:
        raise empty_side(config, side)


def side_source(config: DataConfig, side: Side) -> SourceConfig:
    """The source of a side's rows."""
    own = config.validation.source
    return own if side == "validation" and own is not None else config.source


def train_rows(config: DataConfig) -> Iterator[Row]:
    """The rows to train on; raises InputError if there are none."""
    return (row for _, row in numbered_rows(config, "train"))


def validation_rows(config: DataConfig) -> Iterator[Row]:
    """The held-out rows; raises InputError if there are none."""
    return (row for _, row in numbered_rows(config, "validation"))


def empty_side(config: DataConfig, side: Side) -> InputError:
    """The error for a side without rows, with the cause and what to do."""
    own = config.validation.source
    if side == "validation" and own is not None:
        return InputError(f"the validation source has no rows: {describe(own)}")
    if own is not None:
        return InputError(f"the source has no rows: {describe(config.source)}")
    alike = config.validation.group_by or "content"
    return InputError(
        f"the {side} side of {describe(config.source)} has no rows: the source is empty, or too small for "
        f"data.validation.fraction = {config.validation.fraction}, with rows of equal {alike} on one side; give more "
        "rows or change the fraction"
    )


_FEW_ROWS = 1_000


@dataclass(frozen=True)
class Split:
    """Assigns rows to sides if validation is a fraction of the source.

    The side depends only on the seed and on the row's content: on what it has in `columns`, or in the column
    `group_by`. So equal rows are on the same side, no row changes its side when others are added, removed or moved, and
    the split needs neither a second pass nor the number of rows. The exception are files with so few different rows
    that a side would be empty: for them, another seed is taken.
    """

    seed: int
    fraction: float
    columns: tuple[str, ...]
    group_by: str | None

    @staticmethod
    def of(config: DataConfig) -> Split:
        validation = config.validation
        assert validation.fraction is not None
        columns = () if validation.group_by else config.format.content_columns
        split = Split(validation.seed, validation.fraction, columns, validation.group_by)
        return split._for_few_rows(config.source) if isinstance(config.source, FilesSource) else split

    def _for_few_rows(self, source: SourceConfig) -> Split:
        """This split, or one with the first seed after its own that leaves rows on both sides, if there is one."""
        keys: list[int] = []
        sides: set[bool] = set()
        for number, row in enumerate(islice(rows(source), _FEW_ROWS + 1)):
            keys.append(self._key(number, row))
            sides.add(held_out(self.seed, self.fraction, keys[-1]))
            if len(sides) == 2 or len(keys) > _FEW_ROWS:
                return self
        for seed in range(self.seed + 1, self.seed + 1_000):
            if len({held_out(seed, self.fraction, key) for key in keys}) == 2:
                return replace(self, seed=seed)
        return self

    @property
    def columns_read(self) -> set[str]:
        return set(self.columns) if self.group_by is None else {self.group_by}

    def side(self, number: int, row: Row) -> Side:
        """The side of a row. Raises ConfigError if it has no column `group_by`; `number` is only for the message."""
        return "validation" if held_out(self.seed, self.fraction, self._key(number, row)) else "train"

    def _key(self, number: int, row: Row) -> int:
        if self.group_by is None:
            content: Any = {name: row[name] for name in self.columns if row.get(name) is not None}
        elif self.group_by in row:
            content = row[self.group_by]
        else:
            raise ConfigError(
                f"data.validation.group_by={self.group_by}: row {number} has no such field, it has "
                f"{', '.join(row)}; name one of these, or null to split by the whole content"
            )
        return hash_value(content)


def held_out(seed: int, fraction: float, key: int) -> bool:
    """Whether a row is held out: whether the hash of (seed, 64-bit key), scaled to [0, 1), is below the fraction."""
    return mix(mix(seed % 2**64) ^ key) < fraction * 2**64
