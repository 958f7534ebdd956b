"""Compose the configurations that task=inspect asks for: run files with other models in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pretune.core.config import ConfigError, nearest
from pretune.launch.compose import composed, plain
from pretune.launch.groups import CONFIGS, run_files, run_names
from pretune.launch.model_of_start import with_model
from pretune.launch.older import completed
from pretune.launch.overrides import readable

BASE = CONFIGS / "base.yaml"


def composer(overrides: Sequence[str]) -> Callable[[str | None, Sequence[str]], dict[str, Any]]:
    """A function that composes a run file with `overrides`, except where it is given others; for None, what ships with
    Pretune, with nothing but what it is given."""

    def compose(other: str | None, more: Sequence[str]) -> dict[str, Any]:
        if other is None:
            with composed(BASE, ["name=none", *readable(more, sweep=False)]) as config:
                return plain(with_model(config), BASE)
        path = _run_file(other)
        given = {_key(word) for word in more}
        kept = [word for word in overrides if _key(word) not in given and not _key(word).startswith("inspect.")]
        with composed(path, [*kept, *readable(more, sweep=False)]) as config:
            mapping = plain(with_model(config), path)
        return completed(mapping, path)

    return compose


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _run_file(given: str) -> Path:
    path = Path(given).absolute()
    if not path.is_file() or path.suffix != ".yaml":
        raise ConfigError(f"inspect.on = {given} is no run file{nearest(path.stem, run_names())}\n{run_files()}")
    return path
