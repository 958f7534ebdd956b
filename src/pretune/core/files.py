"""Atomic writes of files and folders, file locks, and content fingerprints."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""peft's names for the files of an adapter, in checkpoints and exports."""


def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader, even after a crash, sees either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        _publish_mode(Path(temporary), 0o666)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, atomically, with a fingerprint of its own content."""
    written = json.loads(json.dumps(content))  # as a reader will parse it
    write_json(path, {**written, "fingerprint": fingerprint(written)})


def read_sealed(path: Path) -> dict[str, Any]:
    """The object that `write_sealed` wrote; ValueError if the fingerprint does not match."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    if not isinstance(content, dict) or content.pop("fingerprint", None) != fingerprint(content):
        raise ValueError("its content is not what was written")
    return content


def measure(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as a JSON-serializable mapping."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `path` when the block succeeds and deleted when it fails.

    If `path` exists by then (another process was faster), the existing folder is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        _sync(temporary)
        _publish_mode(temporary, 0o777)
        with contextlib.suppress(FileExistsError):
            if not path.exists():
                os.rename(temporary, path)
                _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def exclusive(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold the lock file `path` for the duration of the block. If another process holds it, `wait` or raise
    BlockingIOError. Raises OSError if the file cannot be written.

    The operating system releases the lock when the process ends, however it ends. Yields False, without a lock, on a
    file system that has no locks.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    # No fallback to a soft lock (the mere existence of a file): it would outlive a killed process.
    lock = FileLock(path, blocking=wait, preserve_lock_file=True, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(errno.EWOULDBLOCK, "another process holds the lock", str(path)) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


def fingerprint(value: Any) -> str:
    """Sixteen hex digits that depend on the content of a JSON-serializable value, but not on its key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _publish_mode(temporary: Path, mode: int) -> None:
    """Apply the user's umask: temporary files and folders are created private."""
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(mode & ~umask)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
