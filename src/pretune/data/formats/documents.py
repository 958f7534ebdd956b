"""Turn a source's rows into documents for training and problems for evaluation, skipping unusable rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from pretune.data.config import DataConfig
from pretune.data.formats.formatter import Formatter
from pretune.data.formats.grids import GridTask
from pretune.data.formats.problems import Problem, Question
from pretune.data.formats.segments import ColumnCheck, Place, Segment, Unusable
from pretune.data.sources.rows import Row, Side, numbered_rows, side_source

T = TypeVar("T")


def documents(config: DataConfig, side: Side, formatter: Formatter) -> Iterator[list[Segment]]:
    """The documents of one side."""
    for of_row in _usable(config, side, formatter.documents):
        yield from of_row


def training_texts(config: DataConfig, formatter: Formatter) -> Iterator[str]:
    """The text of every training document."""
    return ("".join(segment.text for segment in segments) for segments in documents(config, "train", formatter))


def problems(config: DataConfig, formatter: Formatter) -> Iterator[Problem]:
    """The held-out multiple-choice problems, in the order of their source; ConfigError for a format without any."""
    return _usable(config, "validation", formatter.problem)


def questions(config: DataConfig, formatter: Formatter) -> Iterator[Question]:
    """The held-out problems whose generated answers can be checked, in the order of their source; ConfigError for a
    format without any."""
    return _usable(config, "validation", formatter.question)


def tasks(config: DataConfig, formatter: Formatter) -> Iterator[GridTask]:
    """The held-out tasks of grids, in the order of their source; ConfigError for a format without any."""
    return _usable(config, "validation", formatter.task)


def _usable(config: DataConfig, side: Side, read: Callable[[Row, Place], T]) -> Iterator[T]:
    source, columns = side_source(config, side), ColumnCheck()
    for number, row in numbered_rows(config, side):
        try:
            found = read(row, Place(source, number))
        except Unusable as reason:
            columns.add(reason)
            continue
        columns.add(None)
        yield found
    columns.end()
