"""Errors of the operating system, explained to the user: anything may be missing, full, forbidden or in the way."""

from __future__ import annotations

import errno

from pretune.core.config import InputError

_AGAIN = "then run the same command again: saved work is kept"
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), f"free some space on that disk, {_AGAIN}"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), f"fix its permissions, {_AGAIN}"),
    **dict.fromkeys(
        (errno.EISDIR, errno.EEXIST, errno.ENOTDIR, errno.ENOTEMPTY, errno.ENXIO),
        f"something of another kind is in the way: move it, {_AGAIN}",
    ),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), f"allow more open files (ulimit -n), {_AGAIN}"),
    errno.EROFS: "choose an output_dir and a PRETUNE_CACHE on a disk that can be written to",
    errno.ENAMETOOLONG: "choose a shorter name or path",
    errno.ELOOP: "its symbolic links lead in a circle: correct them",
    errno.ENOENT: f"it was moved or deleted: put it back, or delete what belongs to it, {_AGAIN}",
}
_OTHER = f"see to that disk or device, {_AGAIN}"


def explained(error: OSError, instead: str) -> InputError | None:
    """The error for the user; None if it says nothing about the system (some libraries derive their own from OSError).

    instead: what the error is about if it names no file.
    """
    if error.errno is None or error.strerror is None:
        return None
    where = error.filename2 or error.filename or instead
    return InputError(f"{where}: {error.strerror.lower()}; {_REMEDIES.get(error.errno, _OTHER)}")
