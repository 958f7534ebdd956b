"""Run a task from a plain mapping: validate the configuration and dispatch on `task`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pretune.compute.allocator import is_out_of_memory
from pretune.core.config import ConfigError, validate
from pretune.core.launched import launched
from pretune.core.system_errors import explained
from pretune.run.config import RunConfig

if TYPE_CHECKING:
    from pretune.tasks.inspect.candidates import Compose
    from pretune.tasks.train.running import Instruments


def run(mapping: Mapping[str, Any], instruments: Instruments | None = None, compose: Compose | None = None) -> int:
    """Run the configured task; return the exit code: 0 done, 1 a check failed, 3 diverged, 75 stopped by a signal with
    everything saved.

    instruments: what training is timed, measured and watched with, where that is not the usual. compose: how other
    configurations are made, which only task=inspect needs.

    Raises ConfigError before torch is imported; InputError for anything wrong that the configuration points to, for
    memory that is too small, and for anything that the system refuses (a full disk, a name that is too long).
    """
    config, processes = validate(RunConfig, mapping), launched().count
    if processes > 1 and config.task != "train":
        raise ConfigError(f"task={config.task} is one process, but {processes} were started: start it without torchrun")
    try:
        return _do(config, mapping, instruments, compose)
    except OSError as error:
        # From whatever is read or written, in training or in another task.
        told = explained(error, config.output_dir)
        if told is None or isinstance(error, BrokenPipeError):
            raise
        raise told from None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Outside the handler, because the error's traceback keeps the tensors alive.
    from pretune.run.out_of_memory import out_of_memory

    raise out_of_memory(config)


def _do(config: RunConfig, mapping: Mapping[str, Any], instruments: Instruments | None, compose: Compose | None) -> int:
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
        case "inspect":
            from pretune.tasks.inspect.task import inspect

            if compose is None:
                raise ConfigError("task=inspect compares models in one table: list them all, without -m")
            return inspect(config, compose)
