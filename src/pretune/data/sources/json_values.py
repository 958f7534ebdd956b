"""Read JSON values one after another: JSON lines, arrays, or values that follow each other in any layout.

Values are read as they are written, by Python's own parser: no schema is inferred, integers keep all their digits, and
what a record does not have stays absent. A file is read a block at a time, so memory depends on its largest value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from pretune.core.config import InputError
from pretune.data.sources.data_file import DataFile

BLOCK_CHARACTERS = 1 << 20
"""Characters that are read at once."""

_SPACE = re.compile(r"[ \t\n\r]*")
_LONGEST_LITERAL = len("-Infinity")


def values(file: DataFile, block: int = BLOCK_CHARACTERS) -> Iterator[tuple[int, Any]]:
    """The values of a file, those of top-level arrays one by one, each with the number of its first line.

    Raises InputError for what is not JSON, with line and column.
    """
    with file.text(newline="\n") as stream:
        scanner = _Scanner(stream, file.name, block)
        while mark := scanner.peek():
            if mark != "[":
                yield scanner.line, scanner.value()
                continue
            scanner.take()
            if scanner.peek() == "]":
                scanner.take()
                continue
            while True:
                scanner.peek()
                yield scanner.line, scanner.value()
                if scanner.peek() == "]":
                    scanner.take()
                    break
                if scanner.peek() != ",":
                    raise scanner.fault("a comma or ] is missing after an element of the list")
                scanner.take()


def records(file: DataFile, block: int = BLOCK_CHARACTERS) -> Iterator[dict[str, Any]]:
    """The records ({...}) of a file; InputError for any other value."""
    for line, value in values(file, block):
        if not isinstance(value, dict):
            raise InputError(f"{file.name} line {line} {_not_a_record(value)}")
        yield value


def _not_a_record(value: Any) -> str:
    if isinstance(value, str):
        return 'is a text, not a record: write {"text": ...}, or plain lines in a .txt file'
    kind = {list: "a list", bool: "true or false", type(None): "null"}.get(type(value), "a number")
    return f"is {kind}, not a record ({{...}})"


class _Scanner:
    """A position in a text stream, of which the rest of the current block is in memory."""

    def __init__(self, stream: TextIO, name: str, block: int) -> None:
        self._stream, self._name, self._block = stream, name, block
        self._text, self._at, self._ended = "", 0, False
        self._lines_before, self._columns_before = 0, 0  # of what is no longer in memory
        self._counted, self._counted_to = 0, 0
        self._decoder = json.JSONDecoder()

    @property
    def line(self) -> int:
        """The number of the current line, from 1."""
        self._counted += self._text.count("\n", self._counted_to, self._at)
        self._counted_to = self._at
        return self._lines_before + self._counted + 1

    def peek(self) -> str:
        """The next character that is not white space, which becomes the position; empty at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._more()

    def take(self) -> None:
        """Go past the current character."""
        self._at += 1

    def value(self) -> Any:
        """The value that begins here; the position moves behind it."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended or not self._may_go_on(error):
                    raise self._fault_at(error) from None
            except RecursionError:
                raise self.fault("values are nested too deeply") from None
            except ValueError as error:  # an integer of more digits than Python converts
                raise self.fault(str(error).split(";")[0]) from None
            else:
                # A number near the end of the block may go on: "1" may become "1.5" or "1e-5".
                if self._ended or self._text[end - 1] in '}]"' or len(self._text) - end > len("e-"):
                    break
            self._more()
        begin, self._at = self._at, end
        escaped = self._text.find("\\ud", begin, end) >= 0 or self._text.find("\\uD", begin, end) >= 0
        return _well_formed(value) if escaped else value

    def fault(self, message: str) -> InputError:
        """An error at the current position."""
        return self._fault_at(json.JSONDecodeError(message, self._text, self._at))

    def _fault_at(self, error: json.JSONDecodeError) -> InputError:
        line = self._lines_before + error.lineno
        begins = f" (in the value that begins in line {self.line})" if line > self.line else ""
        column = error.colno + (self._columns_before if error.lineno == 1 else 0)
        return InputError(f"{self._name} line {line}, column {column} is not JSON: {error.msg}{begins}")

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Whether the value may only be incomplete, because it is longer than what has been read."""
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _LONGEST_LITERAL

    def _more(self) -> None:
        """Read on; twice as much while a value is incomplete, so that a long one is not parsed again too often."""
        self._lines_before = self.line - 1
        line_start = self._text.rfind("\n", 0, self._at) + 1
        self._columns_before = self._at - line_start + (0 if line_start else self._columns_before)
        rest = self._text[self._at :]
        new = self._stream.read(max(self._block, len(rest)))
        self._ended = not new
        self._text, self._at, self._counted, self._counted_to = rest + new, 0, 0, 0


def _well_formed(value: Any) -> Any:
    """The value with U+FFFD for each lone surrogate, which is half a character and cannot be encoded as UTF-8."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, dict):
        return {_well_formed(key): _well_formed(inner) for key, inner in value.items()}
    return [_well_formed(inner) for inner in value] if isinstance(value, list) else value
