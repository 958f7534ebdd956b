"""Rows of local files: JSON, Parquet, CSV and text, compressed or not."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pretune.core.config import InputError
from pretune.data.sources.config import FilesSource
from pretune.data.sources.data_file import DataFile
from pretune.data.sources.json_values import records, values
from pretune.data.sources.tables import csv_rows, parquet_rows

Kind = Literal["json", "parquet", "csv", "text"]

SUFFIXES: dict[str, Kind] = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv",
    ".txt": "text", ".text": "text", ".md": "text", ".rst": "text",
}  # fmt: skip
COMPRESSION = {".gz", ".xz", ".zst", ".bz2"}
TEXT_CHARACTERS = 16_384
"""Text files longer than this become several rows, split at line ends, so that part of a file can be held out."""


def rows(config: FilesSource, columns: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of the files in the given order (a glob's matches sorted by name), each as its file has it.

    `columns`: those that are needed; only the first rows of a Parquet file have others too.

    Raises InputError for a file that cannot be read, naming it (and the line, for JSON and CSV), and for a pattern
    without a match.
    """
    readers = READERS | {"parquet": partial(parquet_rows, columns=columns)}
    files = [(readers[kind_of(file, config.format)], DataFile.local(file)) for file in expand(config.files)]
    found = itertools.chain.from_iterable(read(file) for read, file in files)
    return itertools.islice(found, config.max_rows)


def locate(config: FilesSource, row: int) -> str:
    """`file, row n`, with rows counted from 1 in each file. With several files, it rereads them up to that row."""
    if len(config.files) == 1 and not glob.has_magic(config.files[0]):
        return f"{config.files[0]}, row {row + 1}"
    files = expand(config.files)
    for file in files[:-1]:
        read = READERS[kind_of(file, config.format)](DataFile.local(file))
        count = sum(1 for _ in itertools.islice(read, row + 1))
        if count > row:
            return f"{file}, row {row + 1}"
        row -= count
    return f"{files[-1]}, row {row + 1}"


def expand(patterns: tuple[str, ...]) -> list[Path]:
    """The files that paths and globs match; raises InputError for a pattern without a match."""
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            raise InputError(f"'{pattern}' is a folder; name its files, for instance {pattern.rstrip('/')}/*.jsonl")
        matches = [path] if path.is_file() else sorted(Path(p) for p in glob.glob(str(path), recursive=True))
        matches = [match for match in matches if match.is_file()]
        if not matches:
            where = "" if path.is_absolute() else f" in {Path.cwd()}"
            raise InputError(f"no file matches '{pattern}'{where}; check data.source.files")
        files += matches
    return files


def kind_of(file: Path, format: Kind | Literal["auto"]) -> Kind:
    """How to read a file; raises InputError if its name does not tell."""
    kind = _kind_by_name(file) if format == "auto" else format
    if kind is None:
        raise InputError(
            f"cannot tell from its name how to read {file}; set data.source.format to json, parquet, csv or text"
        )
    return kind


def _kind_by_name(file: Path) -> Kind | None:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSION:
        suffixes.pop()
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def listed(path: Path) -> Iterator[Any]:
    """What a file lists: the values of a JSON file, the rows of a table, else the lines that are not blank.

    Raises InputError for a file that cannot be read.
    """
    file, kind = DataFile.local(path), _kind_by_name(path)
    if kind == "json":
        yield from (value for _, value in values(file))
    elif kind in ("csv", "parquet"):
        yield from READERS[kind](file)
    else:
        with file.text(newline=None) as lines:
            yield from (line.removesuffix("\n") for line in lines if line.strip())


def text_rows(file: DataFile) -> Iterator[dict[str, Any]]:
    """One row per file, or one per TEXT_CHARACTERS or so of a long file; line ends become \\n."""
    part: list[str] = []
    length = 0
    with file.text(newline=None) as lines:
        for line in lines:
            part.append(line)
            length += len(line)
            if length >= TEXT_CHARACTERS:
                yield {"text": "".join(part), "source": file.name}
                part, length = [], 0
    if part:
        yield {"text": "".join(part), "source": file.name}


READERS: dict[Kind, Callable[[DataFile], Iterator[dict[str, Any]]]] = {
    "json": records,
    "parquet": parquet_rows,
    "csv": csv_rows,
    "text": text_rows,
}
