"""Hashes that are the same on every machine and with every library version: of integers, of content, of files."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pretune.core.files import fingerprint, measure, read_sealed, write_sealed

Integers = TypeVar("Integers", int, np.ndarray)

_MASK = 2**64 - 1


def mix(value: Integers) -> Integers:
    """The SplitMix64 finalizer of an integer, or of each element of a uint64 array; uniform below 2**64."""
    # uint64 arrays wrap around by themselves; Python integers need the mask.
    value = value + 0x9E3779B97F4A7C15 & _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


def hash_value(value: Any) -> int:
    """A 64-bit hash of a value as a row holds it: JSON-like, with dates and the like by their text."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    # Lone surrogates are valid in JSON files, but not in UTF-8.
    return int.from_bytes(hash_bytes(text.encode("utf-8", "surrogatepass")), "little")


def hash_bytes(content: bytes | memoryview) -> bytes:
    """The 64-bit BLAKE2b digest of some bytes."""
    return hashlib.blake2b(content, digest_size=8).digest()


def hash_file(file: Path, known: Path) -> str:
    """The SHA-256 of a file's bytes, in hex. Raises OSError if it cannot be read.

    The folder `known` remembers it, so that a file is read again only after its size or one of its times has changed.
    `cp -p` and `touch` restore the time of modification, but nothing restores that of the last change of status.
    """
    stat = file.stat()
    state = [str(file.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    note = known / fingerprint(state)
    with contextlib.suppress(OSError, ValueError, KeyError):
        return read_sealed(note)["sha256"]
    digest = measure(file)["sha256"]
    with contextlib.suppress(OSError):  # a cache that cannot be written may still hold prepared data
        write_sealed(note, {"sha256": digest})
    return digest
