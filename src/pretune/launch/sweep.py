"""Sweeps (`-m`): one run for each combination of values, with any of Hydra's sweepers and launchers."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from pretune.core.config import UserError
from pretune.core.files import fingerprint
from pretune.core.terminal import warn
from pretune.dispatch import run
from pretune.launch.compose import QUIET, hydra_for, plain
from pretune.launch.explain import naming_origins
from pretune.launch.model_of_start import with_model
from pretune.launch.older import completed
from pretune.run.folder import RunFolder
from pretune.training.signals import EXIT_STOPPED

LONGEST = 200
"""Maximum number of characters in a job's name; most file systems allow 255 bytes."""


class JobFailed(Exception):
    """Raised for a failed job whose error has been printed. Hydra passes it back from the job's process."""

    @property
    def code(self) -> int:
        return int(self.args[0])


def sweep(file: Path, overrides: Sequence[str]) -> int:
    """Run every job; return the exit code of the first one that failed, or 0. If a job fails, the others still run; a
    signal ends them all."""
    with hydra_for(file, overrides) as name:
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        task = partial(job, file=file, fixed=fixed_keys(overrides))
        try:
            hydra.multirun(name, task, [*QUIET, *overrides], with_log_configuration=False)
        except JobFailed as failed:
            return failed.code
    return 0


def job(config: DictConfig, file: Path, fixed: Collection[str]) -> float | None:
    """Run one job. Return what a sweeper minimizes: the final validation loss for task=train, else None."""
    try:
        overrides = HydraConfig.get().overrides.task
        name = job_name(config.name, overrides, fixed)
        mapping = completed(plain(with_model(config, name), file), file) | {"name": name}
        with naming_origins(file, overrides):
            code = run(mapping)
    except UserError as error:
        warn(f"error: {error}")
        raise JobFailed(2) from None
    if code == EXIT_STOPPED:
        raise SystemExit(code)  # not an Exception, because Hydra would continue with the next job
    if code:
        raise JobFailed(code)
    return final_loss(mapping) if mapping["task"] == "train" else None


def fixed_keys(overrides: Sequence[str]) -> set[str]:
    """Keys that are the same in all jobs: those with a single value."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return {override.get_key_element() for override in parsed if not override.is_sweep_override()}


def job_name(name: str, overrides: Sequence[str], fixed: Collection[str]) -> str:
    """A job's name: the run's name and the values that the sweep sets, restricted to characters allowed in file names
    and to LONGEST."""
    swept = [word for word in overrides if word.partition("=")[0] not in fixed]
    whole = re.sub(r"[^A-Za-z0-9._=,+-]", "-", ",".join([name, *swept]))
    return whole if len(whole) <= LONGEST else f"{whole[: LONGEST - 17]}-{fingerprint(whole)}"


def final_loss(mapping: dict[str, Any]) -> float | None:
    """The final validation loss of a complete run, else None."""
    metrics = RunFolder(Path(mapping["output_dir"]).expanduser() / mapping["name"]).complete()
    return None if metrics is None else metrics["val/loss"]
