"""Atomic writes of files and folders, file locks, and content fingerprints."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""peft's names for the files of an adapter, in checkpoints and exports."""


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) to `path` so that a reader, even after a crash, sees either the old file or the
    new one.

    A symbolic link is followed. Devices, pipes and open files (/dev/stdout) hold nothing to replace: they are written
    to. What killed processes have left of earlier attempts is deleted.
    """
    data = content.encode() if isinstance(content, str) else content
    if is_stream(path):
        _write_stream(path, data)
        return
    path = _followed(path)
    with _temporary(path, _new_file) as temporary:
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            _publish_mode(temporary, 0o666)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def check_writable(path: Path) -> None:
    """Raise OSError if `write_atomic` could not write `path`; leaves nothing there but the folder."""
    if is_stream(path):
        return
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(os.stat(path).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with _temporary(_followed(path), _new_file) as temporary:
        temporary.unlink()


def is_stream(path: Path) -> bool:
    """Whether `path` is a device, a pipe, or a file that is open already, such as /dev/stdout."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    while path.is_symlink() and path.parent.name != "fd":
        path = path.parent / path.readlink()
    is_open = path.parent.name == "fd" and path.parts[:2] in (("/", "proc"), ("/", "dev"))
    return is_open or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file with their ends, but for one that a crash cut short; none if there is no file."""
    if not path.is_file():
        return []
    return [line + b"\n" for line in path.read_bytes().split(b"\n")[:-1]]


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
    """A temporary folder that is renamed to `path` when the block succeeds and deleted when it fails; what killed
    processes have left of earlier attempts is deleted.

    If `path` exists by then (another process was faster), the existing folder is kept.
    """
    path = _followed(path)
    with _temporary(path, _new_folder) as temporary:
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


# --- temporary files and folders


@contextlib.contextmanager
def _temporary(path: Path, new: Callable[[Path, str], Path]) -> Iterator[Path]:
    """A temporary file or folder beside `path`, made by `new(folder, prefix)`, which the block renames or deletes.

    It is locked for the duration of the block, and so told from what killed processes have left, which is deleted:
    the operating system releases a lock when its process ends, however it ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # With the random part and the suffix at most 255 bytes, which is what most file systems allow.
    prefix = f".{path.name.encode()[:200].decode(errors='ignore')}."
    _delete_leftovers(path.parent, prefix)
    while True:
        temporary = new(path.parent, prefix)
        try:
            handle = os.open(temporary, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another process took it for a leftover before it was locked
        try:
            _lock(handle, wait=True)
            if not temporary.exists():
                continue
            yield temporary
            return
        finally:
            os.close(handle)


def _new_file(folder: Path, prefix: str) -> Path:
    handle, name = tempfile.mkstemp(dir=folder, prefix=prefix, suffix=_SUFFIX)
    os.close(handle)
    return Path(name)


def _new_folder(folder: Path, prefix: str) -> Path:
    return Path(tempfile.mkdtemp(dir=folder, prefix=prefix, suffix=_SUFFIX))


_SUFFIX = ".tmp"


def _delete_leftovers(folder: Path, prefix: str) -> None:
    """Delete temporary files and folders that no process holds. Errors are ignored: a later attempt will do it."""
    for left in folder.glob(f"{glob.escape(prefix)}*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            handle = os.open(left, os.O_RDONLY)
            try:
                if not _lock(handle, wait=False):
                    continue
                if left.is_dir():
                    shutil.rmtree(left)
                else:
                    left.unlink()
            finally:
                os.close(handle)


def _lock(handle: int, wait: bool) -> bool:
    """Lock an open file or folder until it is closed; False if another process holds it, or if this system or its file
    system cannot lock it."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (ImportError, OSError):
        return False
    return True


def _followed(path: Path) -> Path:
    """The path itself, where it is a symbolic link."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _write_stream(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_APPEND)  # what stands in a file that is open already stays
    with os.fdopen(handle, "wb") as file:
        file.write(data)


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
