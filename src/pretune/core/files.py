"""Files that are either whole or absent, and names made from content."""

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
    """Write `text` to `path` so that a reader, or a crash, sees the old file or the new one and nothing between."""
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
    written = json.loads(json.dumps(content))  # as a reader will see it
    write_json(path, {**written, "fingerprint": fingerprint(written)})


def read_sealed(path: Path) -> dict[str, Any]:
    """The object that `write_sealed` wrote; ValueError where it is not that."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.pop("fingerprint", None) != fingerprint(content):
        raise ValueError("its content is not what was written")
    return content


def measure(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, JSON-like."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well and vanishes when it does not.

    Where `path` exists by then (another process was first), that one is kept.
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
    """Hold the lock file `path` for as long as the block lasts. Where another process holds it, `wait`, or raise
    BlockingIOError. OSError where the file cannot be written.

    The system lets go of it when the process ends, however that happens. False where the file system has no locks, and
    nothing is held.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    # A lock that is only a file's existence would outlive a process that is killed.
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
    """Sixteen hex digits that depend on the content of a JSON-like value and not on the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _publish_mode(temporary: Path, mode: int) -> None:
    """Temporary files and folders are private; published ones follow the user's umask."""
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(mode & ~umask)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
