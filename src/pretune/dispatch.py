"""From a plain mapping to a finished task: types the configuration and dispatches on `task`."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any

from pretune.core.config import InputError, validate
from pretune.run.config import RunConfig

DISK_FAULTS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR
)  # fmt: skip
"""Errors of the system that the user mends, and not we."""


def run(mapping: Mapping[str, Any]) -> int:
    """Do what the configuration asks for; return the exit code (0 done, 75 stopped by a signal with all saved).

    Raises ConfigError before torch is imported, InputError for what the configuration points at, and for a disk that
    takes nothing more.
    """
    config = validate(RunConfig, mapping)
    try:
        return _do(config, mapping)
    except OSError as error:
        # Whatever was being written, in training or in any other task.
        if error.errno not in DISK_FAULTS:
            raise
        where = error.filename2 or error.filename or config.output_dir
        raise InputError(
            f"{where}: {(error.strerror or '').lower()}; make room on that disk or mend its permissions, then run the "
            "same command again: what is saved stays"
        ) from None


def _do(config: RunConfig, mapping: Mapping[str, Any]) -> int:
    # Each verb is imported only when it is asked for: they bring torch.
    match config.task:
        case "train":
            from pretune.tasks.train.task import train

            return train(config, mapping)
        case "prepare":
            from pretune.tasks.prepare.task import prepare_run

            return prepare_run(config)
        case "evaluate":
            from pretune.tasks.evaluate.task import evaluate_run

            return evaluate_run(config)
        case "generate":
            from pretune.tasks.generate.task import generate

            return generate(config)
        case "export":
            from pretune.tasks.export.task import export

            return export(config)
        case "report":
            from pretune.tasks.report.task import report_runs

            return report_runs(config)
        case "plan":
            from pretune.tasks.plan.task import plan

            return plan(config)
