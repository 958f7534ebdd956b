"""Checkpoints: safetensors and JSON in folders that are written atomically.

    checkpoints/step_00001234/
        model.safetensors      weights and buffers by name, shared ones once; loads anywhere. With an adapter, only the
                               adapter instead: adapter_model.safetensors and adapter_config.json in peft's format
        raw.safetensors        only with EMA: the raw trained weights. The file above then holds the averages
        optimizer.safetensors  optimizer state as <parameter>.<slot> (8-bit state as <parameter>.<slot>:<part>), random
                               generators as random:<device>
        shards/                only where processes share parameters out: the three above, but for an adapter's weights
                               and the random generators, as each process wrote its part of them
        state.json             the caller's state, and the size and SHA-256 of the other files; written last

Names are those of the uncompiled model, without the prefix that torch.compile adds.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretune.checkpoint.contents import OF_RAW, OF_WEIGHTS, OPTIMIZER, RAW, WEIGHTS, Adapter, write
from pretune.checkpoint.generators import generator_states, set_generator_states
from pretune.checkpoint.optimizer_state import load_optimizer
from pretune.checkpoint.shards import SHARDS, read_shards, share, stored_tensors, together
from pretune.checkpoint.tensors import DAMAGED, check_fit, fitting, named_weights, trained_weights
from pretune.core.config import InputError
from pretune.core.files import (
    ADAPTER_WEIGHTS,
    atomic_folder,
    measure,
    read_sealed,
    write_sealed,
)
from pretune.core.named_tensors import check_finite, copy_over, is_sharded

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

STATE = "state.json"
_NAME = re.compile(r"step_\d+")


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep: int | None,
    *,
    adapter: Adapter | None = None,
    averaged: nn.Module | None = None,
    random: Mapping[str, Tensor] | None = None,
    loss: float | None = None,
) -> Path:
    """Write a checkpoint and return its folder; only then delete older ones beyond `keep`.

    `state` is JSON-serializable (a tuple comes back as a list). `averaged`: `model` with averages in place of the
    trained weights; they are what evaluation and later runs load. `random`: what `generator_states` returned when
    `state` was made; None takes the current states. The new checkpoint and the one with the lowest `loss`, among
    those saved with a loss, are never deleted. Processes that share the parameters out all call it. Raises InputError
    if it cannot be written (disk full, read-only); older checkpoints are then untouched.
    """
    path = folder_of(folder, step)
    aside = folder / f".{path.name}.replaced.tmp"
    random = generator_states(model) if random is None else random
    try:
        with together(path) if is_sharded(model) else atomic_folder(path) as temporary:
            files = write(temporary, model, optimizer, adapter, averaged, random)
            if files is None:
                return path
            known = loss if loss is not None and math.isfinite(loss) else None
            content = {"format": 1, "step": step, "loss": known, "files": files, "state": dict(state)}
            write_sealed(temporary / STATE, content)
            if path.exists():  # the same step, for example of a run that was restarted: replace it
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(path, aside)
    except OSError as error:
        if aside.exists() and not path.exists():
            os.rename(aside, path)
        raise InputError(
            f"cannot save a checkpoint in {folder}: {error.strerror or error}; free some space or fix its permissions, "
            "then run the same command to resume from the newest checkpoint"
        ) from None
    _tidy(folder, path, keep)
    return path


def newest(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step in `folder`, or None."""
    return next(iter(checkpoints(folder)), None)


def pick(folder: Path, use: str | int) -> Path | None:
    """The checkpoint in `folder` that `use` selects (CheckpointConfig.use), or None if there are none at all.

    Raises InputError if the requested step does not exist, or if a checkpoint that might be the best is damaged.
    """
    there = checkpoints(folder)
    if isinstance(use, int):
        found = next((path for path in there if step_of(path) == use), None)
        if found is None and there:
            steps = ", ".join(str(step_of(path)) for path in there)
            raise InputError(f"{folder} has no checkpoint of step {use}; set checkpoint.use to best, newest or {steps}")
        return found
    losses = {path: _read_state(path).get("loss") for path in there} if use == "best" else {}
    return _lowest(losses) or next(iter(there), None)


def folder_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, or would lie."""
    return folder / f"step_{step:08d}"


def is_saved(folder: Path, step: int) -> bool:
    """Whether there is a complete checkpoint of that step."""
    return (folder_of(folder, step) / STATE).is_file()


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(path.name.removeprefix("step_"))


def state_of(path: Path) -> dict[str, Any]:
    """The state that was saved with a checkpoint; InputError if it is missing or damaged."""
    return _read_state(path)["state"]


def load(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    *,
    adapter: Adapter | None = None,
    averaged: nn.Module | None = None,
) -> dict[str, Any]:
    """Load a checkpoint's weights into `model`, or into its adapter, and return the state that was saved with them.

    With EMA, `averaged` (or `adapter`, which is then its adapter) gets the averages, and `model` the raw weights. With
    an optimizer, its state and the random generators are restored too, bit for bit. Raises InputError if a file is
    missing, damaged or does not fit; no weights are loaded then.
    """
    content = check(path, share() if is_sharded(model) else (0, 1))
    own = named_weights(averaged or model) if adapter is None else adapter.tensors
    weights = _read(path, WEIGHTS, OF_WEIGHTS, own) if adapter is None else fitting(path / ADAPTER_WEIGHTS, own)
    trained = {} if averaged is None else trained_weights(model)
    raw = {} if averaged is None else _read(path, RAW, OF_RAW, trained)
    if optimizer is not None:
        set_generator_states(model, load_optimizer(path / OPTIMIZER, model, optimizer))
    copy_over(weights, own)
    copy_over(raw, trained)
    return content["state"]


def check(path: Path, share: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """The content of a checkpoint's state.json; InputError unless every file has the recorded size and hash. `share`:
    process i of n looks at every n-th file."""
    content, (rank, count) = _read_state(path), share
    for name, expected in [*content["files"].items()][rank::count]:
        _check(path / name, expected)
    return content


def load_weights(path: Path, model: nn.Module) -> None:
    """Load only weights into `model`: from a checkpoint, the newest checkpoint in a folder, or a safetensors file.

    Raises InputError if there are none, or if they are damaged, are not finite or do not fit.
    """
    if path.is_dir():
        checkpoint = path if (path / WEIGHTS).is_file() or (path / SHARDS).is_dir() else newest(path)
        if checkpoint is None:
            if (path / STATE).is_file():
                check(path)  # raises, naming the missing file
            raise InputError(f"{path} holds no checkpoint")
        if (checkpoint / STATE).is_file():
            for name, expected in _read_state(checkpoint)["files"].items():
                if name == WEIGHTS or name.startswith(f"{SHARDS}/"):
                    _check(checkpoint / name, expected)
        path = checkpoint / WEIGHTS
    own = named_weights(model)
    stored = _read(path.parent, WEIGHTS, OF_WEIGHTS, own) if path.name == WEIGHTS else fitting(path, own)
    check_finite(stored, path)
    copy_over(stored, own)


def _read(path: Path, file: str, prefix: str, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a checkpoint, which must be those of `own` by name and shape: from `file`, or from its shards."""
    import torch

    if not (path / SHARDS).is_dir():
        return fitting(path / file, own)
    check_fit(path / SHARDS, stored_tensors(path, prefix), own)
    found = {name: torch.empty_like(tensor, requires_grad=False) for name, tensor in own.items()}
    read_shards(path, prefix, found)
    return found


# --- files


def _read_state(path: Path) -> dict[str, Any]:
    file = path / STATE
    try:
        content = read_sealed(file)
    except FileNotFoundError:
        raise InputError(f"{path} is not a complete checkpoint: it has no {STATE}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is damaged ({error}); {DAMAGED}") from None
    if _NAME.fullmatch(path.name) and path != (right := folder_of(path.parent, content["step"])):
        raise InputError(f"{path} is the checkpoint of step {content['step']:,}; rename it to {right.name}")
    return content


def _check(path: Path, expected: Mapping[str, Any]) -> None:
    """Raise InputError unless the file has the recorded size and hash; the size first, because checking it is cheap."""
    try:
        size, written = path.stat().st_size, expected["bytes"]
        if size != written:
            raise InputError(f"{path} is damaged: it has {size} bytes but was written with {written}; {DAMAGED}")
        if measure(path) != expected:
            raise InputError(f"{path} is damaged: its content is not what was written; {DAMAGED}")
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); {DAMAGED}") from None


def step_folders(folder: Path) -> list[Path]:
    """What has the name of a checkpoint, newest first, sorted numerically: 10000 comes after 9500."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of, reverse=True)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    return [path for path in step_folders(folder) if (path / STATE).is_file()]


def _lowest(losses: Mapping[Path, float | None]) -> Path | None:
    """The checkpoint with the lowest loss, the earliest of ties; None if none has a loss."""
    known = {path: (loss, step_of(path)) for path, loss in losses.items() if loss is not None}
    return min(known, key=known.__getitem__, default=None)


def _tidy(folder: Path, written: Path, keep: int | None) -> None:
    """Delete checkpoints beyond `keep`, and leftovers of killed saves. Errors in deleting are ignored."""
    there, losses = checkpoints(folder), {}
    for path in there:
        with contextlib.suppress(InputError):  # a damaged checkpoint cannot be the best
            losses[path] = _read_state(path).get("loss")
    others = [path for path in there if path != written]
    surplus = [] if keep is None else [path for path in others[keep - 1 :] if path != _lowest(losses)]
    for path in surplus:
        # Rename first, so that no reader sees a partly deleted checkpoint.
        with contextlib.suppress(OSError):
            os.rename(path, folder / f".{path.name}.deleted.tmp")
    for path in folder.glob(".step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
