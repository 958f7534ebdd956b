"""task=export: check the request, write the files, and report the cost of quantization."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError

from pretune.checkpoint import store as checkpoint
from pretune.core.config import ConfigError, InputError
from pretune.core.files import ADAPTER_WEIGHTS, atomic_folder, write_json
from pretune.core.terminal import say, warn
from pretune.quantization.config import FakeQuantizationConfig
from pretune.run.config import RunConfig
from pretune.run.folder import RunFolder
from pretune.run.precision import resolved_config
from pretune.run.weights import chosen_checkpoint, evaluated_run
from pretune.tasks.export.integers import cost_of_quantization, write_integers
from pretune.training.signals import EXIT_STOPPED, Interrupts, Stop


def export(config: RunConfig) -> int:
    """task=export: write a checkpoint (checkpoint.use) of the run that `config` names, in export.format."""
    run = evaluated_run(config)
    config = resolved_config(config, run)
    path = chosen_checkpoint(run)
    keep = config.export.adapter == "keep"
    if keep and not (path / ADAPTER_WEIGHTS).is_file():
        raise ConfigError(f"{run.name} has no adapter to keep: export.adapter=merge exports its weights")
    rounded = isinstance(config.quantization, FakeQuantizationConfig)
    if keep and rounded:
        raise ConfigError(
            f"quantization={config.quantization.kind} stores the sum of weights and adapter: use "
            "export.adapter=merge, or quantization=none for the adapter alone"
        )
    if config.export.format == "integers" and not rounded:
        raise ConfigError(
            f"export.format=integers with quantization={config.quantization.kind}: choose how to store weights with "
            "quantization=int8_int4, int4_weight_only or int8_weight_only"
        )
    output = _output(config, run, checkpoint.step_of(path))
    try:
        with Interrupts(), atomic_folder(output) as folder:
            use = _write(config, run, path, keep, folder)
            cost = cost_of_quantization(config, run) if rounded and config.export.measure else None
            if cost is not None:
                write_json(folder / "quantization.json", {"kind": config.quantization.kind, **cost})
    except Stop:
        warn("\nstopped; nothing was exported.")
        return EXIT_STOPPED
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write to {output}: {reason}; choose another export.output") from None
    use = use.replace("{output}", str(output))
    say(f"{run.name} at step {checkpoint.step_of(path):,} is in {output}. {use}")
    if cost is not None:
        say(
            f"validation loss: {cost['val_float/loss']:.4f} without quantization, {cost['val/loss']:.4f} with "
            f"quantization={config.quantization.kind} ({output / 'quantization.json'})"
        )
    return 0


def _write(config: RunConfig, run: RunFolder, path: Path, keep: bool, folder: Path) -> str:
    """Write the files into `folder`; return instructions for use, with {output} for their final folder."""
    match config.export.format:
        case "huggingface":
            from pretune.tasks.export.huggingface import write_adapter, write_model

            return write_adapter(config, path, folder) if keep else write_model(config, run, folder)
        case "integers":
            return write_integers(config, run, folder)
        case "executorch":
            from pretune.tasks.export.runtimes import write_program

            return write_program(config, run, checkpoint.step_of(path), folder)
        case "onnx":
            from pretune.tasks.export.runtimes import write_onnx_file

            return write_onnx_file(config, run, checkpoint.step_of(path), folder)


def _output(config: RunConfig, run: RunFolder, step: int) -> Path:
    section = config.export
    adapter = "-adapter" if section.adapter == "keep" else ""
    rounded = f"-{config.quantization.kind}" if isinstance(config.quantization, FakeQuantizationConfig) else ""
    name = f"{section.format}{adapter}{rounded}-step_{step:08d}"
    output = run.path / "export" / name if section.output is None else Path(section.output).expanduser()
    if output.exists():
        raise InputError(f"{output} exists already; delete it, or choose another folder: export.output=...")
    return output
