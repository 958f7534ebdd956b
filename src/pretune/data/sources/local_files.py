"""Read rows from local files through `datasets`: JSON, Parquet and text, compressed or not."""

from __future__ import annotations

import glob
import importlib.util
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from pretune.core.config import InputError
from pretune.data.sources.config import FilesSource
from pretune.data.sources.hub import error_summary, quiet_libraries

Kind = Literal["json", "parquet", "text"]

SUFFIXES: dict[str, Kind] = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet",
    ".txt": "text", ".text": "text", ".md": "text", ".rst": "text",
}  # fmt: skip
COMPRESSION = {".gz", ".xz", ".zst", ".bz2"}
TEXT_CHARACTERS = 16_384
"""Text files longer than this become several rows, split at line ends, so that part of a file can be held out."""


def rows(config: FilesSource) -> Iterator[dict[str, Any]]:
    """Rows of the files in the given order (a glob's matches sorted by name).

    Raises InputError for a file that cannot be read, naming it (and the line, for JSON), and for a pattern without a
    match.
    """
    files = expand(config.files)
    pairs: list[tuple[Kind, Path]] = [(kind_of(file, config.format), file) for file in files]
    groups = itertools.groupby(pairs, key=_kind)
    found = itertools.chain.from_iterable(_read(kind, [file for _, file in group]) for kind, group in groups)
    return itertools.islice(found, config.max_rows)


def locate(config: FilesSource, row: int) -> str:
    """`file, row n`, with rows counted from 1 in each file. With several files, it rereads them up to that row."""
    if len(config.files) == 1 and not glob.has_magic(config.files[0]):
        return f"{config.files[0]}, row {row + 1}"
    for file in expand(config.files):
        one = config.model_copy(update={"files": (glob.escape(str(file)),), "max_rows": None})
        count = sum(1 for _ in itertools.islice(rows(one), row + 1))
        if count > row:
            return f"{file}, row {row + 1}"
        row -= count
    raise AssertionError("the row was read from these files")


def _kind(pair: tuple[Kind, Path]) -> Kind:
    return pair[0]


def expand(patterns: tuple[str, ...]) -> list[Path]:
    """The files that paths and globs match; raises InputError for a pattern without a match."""
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
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
    suffixes = file.suffixes
    if suffixes and suffixes[-1] == ".zst" and importlib.util.find_spec("zstandard") is None:
        raise InputError(f"reading {file} needs the package zstandard: pip install zstandard")
    if format != "auto":
        return format
    if suffixes and suffixes[-1].lower() in COMPRESSION:
        suffixes = suffixes[:-1]
    kind = SUFFIXES.get(suffixes[-1].lower()) if suffixes else None
    if kind is None:
        raise InputError(
            f"cannot tell from its name how to read {file}; set data.source.format to json, parquet or text"
        )
    return kind


def _read(kind: Kind, files: list[Path]) -> Iterator[dict[str, Any]]:
    if kind == "text":
        for file in files:
            yield from _text_rows(file)
        return
    # `datasets` cannot stream files that are all empty. An empty file has no rows.
    files = [file for file in files if file.stat().st_size]
    if not files:
        return
    with quiet_libraries():
        try:
            for row in _stream(kind, files):
                yield dict(row)
        except GeneratorExit:
            raise
        except Exception as error:
            names = ", ".join(map(str, files[:3])) + (", ..." if len(files) > 3 else "")
            fault = _json_fault(files) if kind == "json" else _parquet_fault(files)
            raise InputError(fault or f"cannot read {names}: {error_summary(error)}") from error


def _stream(kind: Kind, files: list[Path], **options: Any) -> Any:
    import datasets

    # Escaped, because `datasets` treats file names as patterns.
    names = [glob.escape(str(file.resolve())) for file in files]
    return datasets.load_dataset(kind, data_files=names, split="train", streaming=True, **options)


def _text_rows(file: Path) -> Iterator[dict[str, Any]]:
    """One row per file, or one per TEXT_CHARACTERS or so of a long file."""
    part: list[str] = []
    length = 0
    if not file.stat().st_size:
        return
    with quiet_libraries():
        try:
            for row in _stream("text", [file], keep_linebreaks=True):
                part.append(row["text"])
                length += len(row["text"])
                if length >= TEXT_CHARACTERS:
                    yield {"text": "".join(part), "source": str(file)}
                    part, length = [], 0
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not UTF-8 text (byte {error.start} of a block); convert it first") from error
        except Exception as error:  # each compression library raises its own errors
            raise InputError(f"cannot read {file}: {error_summary(error)}") from error
    if part:
        yield {"text": "".join(part), "source": str(file)}


def _parquet_fault(files: list[Path]) -> str | None:
    import pyarrow
    import pyarrow.parquet

    for file in files:
        try:
            pyarrow.parquet.ParquetFile(file).close()
        except (pyarrow.ArrowException, OSError) as error:
            return f"{file} is not a parquet file: {error_summary(error)}"
    return None


def _json_fault(files: list[Path]) -> str | None:
    """The file and line that is not valid JSON, found by rereading the files with Python's own parser."""
    import fsspec

    for file in files:
        try:
            # `infer` detects compression by the file's name, whereas `datasets` looks at its content.
            with fsspec.open(str(file.resolve()), "rb", compression="infer") as opened:
                fault = _fault_of_lines(opened)  # type: ignore[arg-type]
        except Exception as error:  # each compression library raises its own errors
            fault = f"cannot be decompressed: {error_summary(error)}"
        if fault:
            return f"{file} {fault}"
    return None


def _fault_of_lines(file: IO[bytes]) -> str | None:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        record, fault = _parse(line.strip())
        if isinstance(record, dict):
            continue
        if number == 1:  # not JSON lines, so perhaps a single value that spans several lines
            return _fault_of_whole((line + file.read()).rstrip())
        return f"line {number}{(fault or ' is not a record ({...})').removeprefix('line 1')}"
    return None


def _fault_of_whole(content: bytes) -> str | None:
    value, fault = _parse(content)
    if fault is not None:
        return fault
    if isinstance(value, list) and all(isinstance(record, dict) for record in value):
        return None
    return "is JSON, but neither a list of records nor one record per line"


def _parse(content: bytes) -> tuple[Any, str | None]:
    try:
        return json.loads(content.decode("utf-8-sig")), None
    except json.JSONDecodeError as error:
        return None, f"line {error.lineno}, column {error.colno} is not JSON: {error.msg}"
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return None, f"line {line} is not UTF-8 text"
