"""task=plan: estimate a run from its configuration alone, without reading data or training."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from pretune.compute.devices import named
from pretune.core.config import InputError
from pretune.core.files import write_json
from pretune.core.terminal import say
from pretune.run.config import RunConfig
from pretune.run.planned import planned_precision
from pretune.tasks.plan.estimate import make_plan
from pretune.tasks.plan.table import show


def plan(config: RunConfig) -> int:
    """task=plan: print the plan, and write it as JSON to plan.file if set."""
    device = None if config.plan.device is None else named(config.plan.device)
    config = planned_precision(config, device)
    with Console(stderr=True).status("simulating a step without data, and searching for the biggest model ..."):
        made = make_plan(config)
    show(made)
    if config.plan.file is not None:
        try:
            write_json(Path(config.plan.file), made.as_json())
        except OSError as error:
            raise InputError(f"cannot write {config.plan.file}: {error.strerror}; choose another plan.file") from None
        say(f"written to {config.plan.file}")
    return 0
