"""A run is where its folder lies: its name and output_dir come from there, whatever its config.yaml says."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pretune.core.config import ConfigError
from pretune.launch.overrides import quoted
from pretune.run.config import RunConfig
from pretune.run.folder import RunFolder, escaped


def placed(file: Path, overrides: Sequence[str]) -> list[str]:
    """`overrides`, after those that name the run whose config.yaml `file` is; unchanged for any other file.

    A run that was renamed, moved or copied is the one where it lies now. `name` and `output_dir` on the command line go
    before. Raises ConfigError for a folder whose name cannot be the name of a run.
    """
    run = run_at(file)
    if run is None:
        return list(overrides)
    folder = run.path
    given = {override.partition("=")[0].lstrip("+") for override in overrides}
    found = []
    if "name" not in given:
        found.append(f"name={quoted(_name(folder))}")
    if "output_dir" not in given:
        relative = os.path.relpath(folder.parent)
        place = str(folder.parent) if relative.startswith("..") else relative
        found.append(f"output_dir={quoted(escaped(place))}")
    return [*found, *overrides]


def run_at(file: Path) -> RunFolder | None:
    """The run whose own config.yaml `file` is, or None for any other file."""
    run = RunFolder(file.parent.resolve())
    return run if file.name == run.config.name and run.started() else None


def _name(folder: Path) -> str:
    field = RunConfig.model_fields["name"]
    try:
        return TypeAdapter(field.rebuild_annotation()).validate_python(folder.name)
    except ValidationError:
        raise ConfigError(
            f"{folder} holds a run, which is named after its folder: rename the folder to letters, digits and . _ = , "
            "+ - (or give name=... and output_dir=... of another run)"
        ) from None
