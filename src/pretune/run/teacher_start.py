"""Where the weights of a distillation's teacher come from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pretune.checkpoint.identity import newest_state, with_identity
from pretune.core.config import ConfigError, InputError
from pretune.objectives.config import DistillationConfig
from pretune.run.config import RunConfig
from pretune.run.folder import RunFolder
from pretune.run.weights import Start, find_start, own_folder, start_identity_of

TEACHER = "stage.objective.teacher"


def find_teacher(config: RunConfig, config_only: bool = False) -> Start | None:
    """The teacher of the run, with its checkpoint; None if it has none. A run that has saved something keeps the
    weights that it began with.

    Raises ConfigError for the run itself, InputError if the teacher is not there or has other weights now. config_only:
    see find_start.
    """
    section, own = config.stage.objective, own_folder(config)
    if not isinstance(section, DistillationConfig):
        return None
    runs = own.path.parent
    if any(path.resolve() == own.path.resolve() for path in (runs / section.teacher, Path(section.teacher))):
        raise ConfigError(f"{TEACHER}: {config.name} cannot be its own teacher; name another run, or change name=...")
    found = find_start(section.teacher, runs, config_only, TEACHER)
    recorded = (newest_state(own.checkpoints) or {}).get("teacher")
    if config_only or recorded is None or start_identity_of(found) == recorded:
        return found
    path = with_identity(found.checkpoints, recorded) if isinstance(found, RunFolder) else None
    if path is None:
        raise InputError(
            f"{TEACHER}: {own.path} learned from other weights than {section.teacher} has now; restore them, or name "
            "where they are"
        )
    return replace(found, checkpoint=path)
