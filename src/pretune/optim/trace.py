"""progress.txt: the progress and the number of tokens of each step of a run; line n is step n.

With a time budget, these are the only values that depend on the clock: with this file a run can be repeated exactly.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

from pretune.core.config import InputError
from pretune.core.files import whole_lines, write_atomic
from pretune.optim.budget import Step

_CHECKSUM = "progress_crc32"


class Trace:
    """Writes progress.txt as steps are taken."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def recorded(self) -> dict[str, int]:
        """The CRC-32 of the file, by its name."""
        return {_CHECKSUM: zlib.crc32(b"".join(whole_lines(self._path)))}

    def rewind(self, num_steps: int, recorded: Mapping[str, int] | None = None) -> bool:
        """Keep the first `num_steps` lines, atomically; lines lost in a crash are marked as lost. Returns whether these
        lines are what was `recorded` after so many steps."""
        lines = whole_lines(self._path)[:num_steps]
        lost = [f"{_line(Step(math.nan, 0))}\n".encode()] * (num_steps - len(lines))
        write_atomic(self._path, b"".join([*lines, *lost]))
        return (recorded or {}).get(_CHECKSUM) in (None, zlib.crc32(b"".join(lines)))

    def append(self, step: Step) -> None:
        """Add a step that has been taken."""
        # Open, write once, close: a partial line is never left in a buffer.
        handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(handle, (_line(step) + "\n").encode())
        finally:
            os.close(handle)


def read_trace(path: Path) -> list[Step]:
    """The steps of a run that has used up its budget; InputError if it has not, or if the file is incomplete."""
    try:
        lines = path.read_text().split("\n")[:-1]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} ({error}); set budget.replay to a run or to its progress.txt") from None
    steps = [_parse(path, number, line) for number, line in enumerate(lines, start=1)]
    if not steps or steps[-1].progress < 1:
        raise InputError(
            f"{path} ends after {len(steps)} steps, before the end of the budget; only a run that has used up its "
            "budget can be replayed"
        )
    return steps


def _line(step: Step) -> str:
    return f"{step.progress!r} {step.tokens}"


def _parse(path: Path, number: int, line: str) -> Step:
    try:
        progress, tokens = line.split(" ")
        step = Step(float(progress), int(tokens))
        if not (0 <= step.progress <= 1 and step.tokens > 0):
            raise ValueError
    except ValueError:
        raise InputError(
            f"{path}, line {number} is '{line[:40]}', not a progress from 0 to 1 followed by a number of tokens; "
            "set budget.replay to a run or to its progress.txt"
        ) from None
    return step
