"""Damage to a file, as a disk or a copy does it."""

from __future__ import annotations

from pathlib import Path


def flip(path: Path, at: int | None = None) -> None:
    """Flip a bit of the byte `at`, or of the one in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 4
    path.write_bytes(content)


def cut(path: Path, count: int = 1) -> None:
    """Cut the last `count` bytes off."""
    path.write_bytes(path.read_bytes()[:-count])
