"""What a resume starts from: the newest checkpoint that is whole. A damaged one costs an interval, not the run."""

from __future__ import annotations

import os
from pathlib import Path

from pretune.checkpoint.store import check, step_folders
from pretune.core.config import InputError


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in `folder` (None if nothing was saved there yet), and a line for each newer one,
    which is set aside as `damaged_step_...`.

    Reads every byte of that checkpoint. Raises InputError, and changes nothing, if there are checkpoints and none is
    whole; InputError too if one cannot be renamed.
    """
    found, faults = None, dict[Path, str]()
    for path in step_folders(folder):
        try:
            check(path)
        except InputError as error:
            faults[path] = str(error).partition(";")[0]
        else:
            found = path
            break
    if found is None and faults:
        path, fault = next(iter(faults.items()))
        raise InputError(
            f"no checkpoint in {folder} is whole ({path.name}: {fault}); restore one from a copy, or delete {folder} "
            "to begin again"
        )
    for path in faults:
        try:
            os.rename(path, _unused(folder / f"damaged_{path.name}"))
        except OSError as error:
            raise InputError(f"cannot set {path} aside ({error.strerror}), which is damaged; move it away") from None
    return found, [
        f"set aside as damaged_{path.name}: {fault}; going on from {found and found.name}"
        for path, fault in faults.items()
    ]


def _unused(path: Path) -> Path:
    """The path, or one with a number, where nothing is yet."""
    number, unused = 1, path
    while unused.exists():
        number += 1
        unused = path.with_name(f"{path.name}_{number}")
    return unused
