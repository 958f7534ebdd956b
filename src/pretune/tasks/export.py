"""Writes a run's model for other programs to load."""

from __future__ import annotations

from pathlib import Path

from pretune import checkpoint
from pretune.assembly import chosen_checkpoint, measured_run
from pretune.config import ConfigError, InputError
from pretune.files import atomic_folder
from pretune.run_config import RunConfig
from pretune.run_folder import RunFolder


def export(config: RunConfig) -> int:
    """task=export: write a checkpoint of the run that `config` names (checkpoint.use), in the format it asks for."""
    run = measured_run(config)
    path = chosen_checkpoint(run)
    keep = config.export.adapter == "keep"
    if keep and not (path / checkpoint.ADAPTER).is_file():
        raise ConfigError(f"{run.name} has no adapter to keep: export.adapter=merge exports its weights")
    output = _output(config, run, checkpoint.step_of(path))
    try:
        with atomic_folder(output) as folder:
            use = _write(config, run, path, keep, folder)
    except OSError as error:
        raise InputError(f"cannot write to {output}: {error.strerror or error}; choose another export.output") from None
    print(f"{run.name} at step {checkpoint.step_of(path):,} is in {output}. {use.format(output=output)}")
    return 0


def _write(config: RunConfig, run: RunFolder, path: Path, keep: bool, folder: Path) -> str:
    """Write the files into `folder`; returns what to do with `{output}`, where they will be."""
    match config.export.format:
        case "huggingface":
            from pretune.tasks.export_huggingface import write_adapter, write_model

            return write_adapter(config, path, folder) if keep else write_model(config, run, folder)


def _output(config: RunConfig, run: RunFolder, step: int) -> Path:
    section = config.export
    adapter = "-adapter" if section.adapter == "keep" else ""
    name = f"{section.format}{adapter}-step_{step:08d}"
    output = run.path / "export" / name if section.output is None else Path(section.output).expanduser()
    if output.exists():
        raise InputError(f"{output} exists already; delete it, or choose another folder: export.output=...")
    return output
