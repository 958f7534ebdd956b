"""Rows of tables: Parquet and CSV."""

from __future__ import annotations

import csv
import datetime
import decimal
import itertools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pretune.core.config import InputError
from pretune.data.sources.data_file import DataFile

BATCH_ROWS = 1_000
"""Rows of a Parquet file that are decoded at once."""


def parquet_rows(file: DataFile, columns: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, with the values that JSON would have (see `as_json`).

    The first BATCH_ROWS have all columns; the others only `columns`, if these are given and the file has any of them.
    """
    import pyarrow
    import pyarrow.parquet

    with file.bytes() as stream:
        try:
            table = pyarrow.parquet.ParquetFile(stream)
            names = table.schema_arrow.names
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise InputError(f"{file.name} has two columns named '{twice[0]}'; rename one")
            needed = None if columns is None else [name for name in names if name in columns]
            batches = table.iter_batches(BATCH_ROWS)
            if needed:
                rest = itertools.islice(table.iter_batches(BATCH_ROWS, columns=needed), 1, None)
                batches = itertools.chain(itertools.islice(batches, 1), rest)
            for batch in batches:
                for row in batch.to_pylist(maps_as_pydicts="lossy"):
                    yield {name: as_json(value) for name, value in row.items()}
        except pyarrow.ArrowException as error:
            reason = (str(error).splitlines() or [""])[0]
            raise InputError(f"{file.name} is not a parquet file, or is damaged: {reason}") from error


def csv_rows(file: DataFile) -> Iterator[dict[str, Any]]:
    """The rows of a CSV file whose first line names the columns; every value is text. Tabs separate in .tsv files."""
    delimiter = "\t" if ".tsv" in file.name.lower().rpartition("/")[2] else ","
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long document
    with file.text(newline="") as stream:
        lines = csv.reader(stream, delimiter=delimiter, strict=True)
        try:
            columns = next(lines, [])
            if twice := {name for name in columns if columns.count(name) > 1}:
                raise InputError(f"{file.name} line 1 names column {', '.join(sorted(twice))!r} twice")
            for cells in lines:
                if not cells:  # an empty line
                    continue
                if len(cells) != len(columns):
                    raise InputError(
                        f"{file.name}: the row that ends in line {lines.line_num} has {len(cells)} values for "
                        f"{len(columns)} columns; put values with commas or line breaks in double quotes"
                    )
                yield dict(zip(columns, cells, strict=True))
        except csv.Error as error:
            raise InputError(f"{file.name} line {lines.line_num} is not CSV: {error}") from error


def as_json(value: Any) -> Any:
    """A value of a table as JSON would have it: dates as ISO 8601 text, decimals as text, bytes as text if they are.

    In a table every record of a column has all keys, so a key whose value is null inside a record counts as absent.
    """
    if isinstance(value, str | int | float | None):
        return value
    if isinstance(value, Mapping):
        return {key: as_json(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return str(value) if isinstance(value, decimal.Decimal | datetime.timedelta) else value
