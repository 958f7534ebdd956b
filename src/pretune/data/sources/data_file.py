"""A file of rows, wherever it lies: opens its bytes or its text, decompressed and decoded by what they are."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TextIO

import zstandard

from pretune.core.config import InputError

_BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark is the first half of this one
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass(frozen=True)
class DataFile:
    """A file that can be opened again and again; `name` is for messages."""

    name: str
    open: Callable[[], IO[bytes]]
    """Opens the bytes as they are stored."""

    @staticmethod
    def local(path: Path) -> DataFile:
        return DataFile(str(path), lambda: path.open("rb"))

    @contextlib.contextmanager
    def bytes(self) -> Iterator[io.BufferedReader]:
        """The content, decompressed if it begins like a .gz, .xz, .bz2 or .zst file, whatever its name.

        Raises InputError, here and inside the block, for a file that cannot be read or decompressed.
        """
        with contextlib.ExitStack() as stack:
            try:
                # Closed by hand, because the decompressors leave open what they read from.
                stored = io.BufferedReader(stack.enter_context(contextlib.closing(self.open())))  # type: ignore[arg-type]
                yield stack.enter_context(_decompressed(stored, self.name))
            except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
                raise InputError(
                    f"{self.name} cannot be decompressed: {_reason(error)}; it is damaged or incomplete"
                ) from error
            except OSError as error:
                raise InputError(f"cannot read {self.name}: {error.strerror or _reason(error)}") from error

    @contextlib.contextmanager
    def text(self, newline: str | None) -> Iterator[TextIO]:
        """The content as text: UTF-8, or UTF-16 or UTF-32 that shows by its first bytes, without byte order mark.

        `newline` is that of `open`. Raises InputError as `bytes` does, and for bytes that are not such text, naming
        the line.
        """
        with self.bytes() as stream:
            encoding = _encoding(stream.peek(4)[:4])
            try:
                yield io.TextIOWrapper(stream, encoding, newline=newline)
            except UnicodeDecodeError as error:
                raise InputError(self._not_text(encoding)) from error

    def _not_text(self, encoding: str) -> str:
        if not encoding.startswith("utf-8"):
            return f"{self.name} begins as {encoding.upper()} text, but does not go on as such; convert it to UTF-8"
        with self.bytes() as stream:
            # What cannot be decoded becomes lone surrogates, which UTF-8 text cannot contain.
            lines = io.TextIOWrapper(stream, "utf-8", errors="surrogateescape", newline="\n")
            bad = (number for number, line in enumerate(lines, start=1) if any("\udc80" <= c <= "\udcff" for c in line))
            line = next(bad, 1)
        return (
            f"{self.name} line {line} is not UTF-8 text; convert the file first, for instance with "
            "`iconv -f LATIN1 -t UTF-8`"
        )


def _decompressed(stored: io.BufferedReader, name: str) -> io.BufferedReader:
    start = stored.peek(6)
    if start.startswith(b"\x1f\x8b"):
        return io.BufferedReader(gzip.GzipFile(fileobj=stored))  # type: ignore[arg-type]
    if start.startswith(b"\xfd7zXZ\x00"):
        return io.BufferedReader(lzma.LZMAFile(stored))  # type: ignore[arg-type]
    if start.startswith(b"BZh"):
        return io.BufferedReader(bz2.BZ2File(stored))  # type: ignore[arg-type]
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(stored, read_across_frames=True))  # type: ignore[arg-type]
    if start.startswith(b"PK\x03\x04"):
        raise InputError(f"{name} is a .zip archive; unpack it and name the files inside")
    return stored


def _encoding(start: bytes) -> str:
    """The encoding that a text's first four bytes show."""
    for mark, encoding in _BOMS.items():
        if start.startswith(mark):
            return encoding
    # Two characters below U+0100, each with its zero byte.
    zeros = [byte == 0 for byte in start]
    if zeros == [False, True, False, True]:
        return "utf-16-le"
    if zeros == [True, False, True, False]:
        return "utf-16-be"
    return "utf-8"


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
