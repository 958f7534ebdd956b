"""Everything that is printed goes through here: data, models, templates and file names may hold anything, and a
terminal obeys its control characters."""

from __future__ import annotations

import re
import sys
from typing import TextIO

from pretune.core.launched import launched

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str, encoding: str | None = None) -> str:
    """`text` with a replacement character for each control character but tabs and line breaks, and for what the
    encoding (None: UTF-8) lacks."""
    encoding = encoding or "utf-8"
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text).encode(encoding, "replace").decode(encoding)


def shown(text: str) -> str:
    """`text` for a cell or a title of rich's, which it does not take for markup."""
    from rich.markup import escape

    return escape(printable(text))


def say(text: str = "", end: str = "\n", file: TextIO | None = None) -> None:
    """Print a text, made printable, at once; on standard output unless `file` says otherwise. Of several processes that
    were started together, only the first prints."""
    if launched().rank == 0:
        _print(text, end, file or sys.stdout)


def warn(text: str) -> None:
    """Print a line on standard error."""
    say(text, file=sys.stderr)


def warn_from_any(text: str) -> None:
    """Print a line on standard error, whichever process this is."""
    _print(text, "\n", sys.stderr)


def _print(text: str, end: str, stream: TextIO) -> None:
    print(printable(text, stream.encoding), end=end, file=stream, flush=True)
