"""Which weights a checkpoint holds, by their content: a run that is renamed, moved or copied keeps them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from pretune.checkpoint.contents import WEIGHTS
from pretune.checkpoint.shards import SHARDS
from pretune.checkpoint.store import STATE, checkpoints, state_of
from pretune.checkpoint.tensors import DAMAGED
from pretune.core.config import InputError
from pretune.core.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, fingerprint, read_sealed


def identity(path: Path) -> str:
    """Sixteen hex digits that depend on all weights of the checkpoint `path`: for an adapter, on it and, through what
    its configuration says of them, on the weights below it.

    They come from the hashes in state.json, which loading compares with the files. Raises InputError if it is damaged.
    """
    try:
        files = read_sealed(path / STATE)["files"]
        names = (*(name for name in files if name.startswith(f"{SHARDS}/")), WEIGHTS, ADAPTER_WEIGHTS, ADAPTER_CONFIG)
        return fingerprint({name: files[name] for name in names if name in files})
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path / STATE} is damaged ({error}); {DAMAGED}") from None


def with_identity(folder: Path, wanted: str) -> Path | None:
    """The checkpoint in `folder` that holds these weights, or None."""
    for path in checkpoints(folder):
        with contextlib.suppress(InputError):  # a damaged one is not it
            if identity(path) == wanted:
                return path
    return None


def newest_state(folder: Path) -> dict[str, Any] | None:
    """The state of the newest checkpoint in `folder` whose state can be read, or None."""
    for path in checkpoints(folder):
        with contextlib.suppress(InputError):
            return state_of(path)
    return None
