"""Run a task from a plain mapping: validate the configuration and dispatch on `task`."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pretune.compute.allocator import is_out_of_memory
from pretune.core.config import InputError, validate
from pretune.run.config import RunConfig

if TYPE_CHECKING:
    from pretune.tasks.train.loop import Instruments

DISK_FAULTS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR
)  # fmt: skip
"""System errors that only the user can fix."""


def run(mapping: Mapping[str, Any], instruments: Instruments | None = None) -> int:
    """Run the configured task; return the exit code (0 done, 75 stopped by a signal with everything saved).

    instruments: what training is timed, measured and watched with, where that is not the usual.

    Raises ConfigError before torch is imported; InputError for anything wrong that the configuration points to, for
    memory that is too small, and for a disk that cannot be written.
    """
    config = validate(RunConfig, mapping)
    try:
        return _do(config, mapping, instruments)
    except OSError as error:
        # Raised by any write, in training or in another task.
        if error.errno not in DISK_FAULTS:
            raise
        where = error.filename2 or error.filename or config.output_dir
        raise InputError(
            f"{where}: {(error.strerror or '').lower()}; free some space on that disk or fix its permissions, then run "
            "the same command again: saved work is kept"
        ) from None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Outside the handler, because the error's traceback keeps the tensors alive.
    from pretune.run.out_of_memory import out_of_memory

    raise out_of_memory(config)


def _do(config: RunConfig, mapping: Mapping[str, Any], instruments: Instruments | None) -> int:
    # Tasks are imported only when needed, because they import torch.
    match config.task:
        case "train":
            from pretune.tasks.train.task import train

            return train(config, mapping, instruments)
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
