"""From a plain mapping to a finished task: types the configuration and dispatches on `task`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretune.config import validate
from pretune.run_config import RunConfig


def run(mapping: Mapping[str, Any]) -> int:
    """Do what the configuration asks for; return the exit code (0 done, 75 stopped by a signal with all saved).

    Raises ConfigError before torch is imported, InputError for what the configuration points at.
    """
    config = validate(RunConfig, mapping)
    # Each verb is imported only when it is asked for: they bring torch.
    match config.task:
        case "train":
            from pretune.tasks.train import train

            return train(config, mapping)
        case "prepare":
            from pretune.tasks.prepare import prepare_run

            return prepare_run(config)
        case "evaluate":
            from pretune.tasks.evaluate import evaluate_run

            return evaluate_run(config)
        case "generate":
            from pretune.tasks.generate import generate

            return generate(config)
        case "export":
            from pretune.tasks.export import export

            return export(config)
        case "report":
            from pretune.tasks.report import report_runs

            return report_runs(config)
        case "plan":
            from pretune.tasks.plan import plan

            return plan(config)
