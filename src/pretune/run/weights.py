"""Find the run and checkpoint to take weights from, and load them into a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pretune.checkpoint import store as checkpoint
from pretune.core.config import InputError, validate
from pretune.core.files import ADAPTER_WEIGHTS
from pretune.model.transformer import Transformer
from pretune.quantization.config import QloraConfig
from pretune.run.config import RunConfig
from pretune.run.folder import RunFolder, find_run, read_config


def own_folder(config: RunConfig) -> RunFolder:
    """The folder of the run that `config` describes, whether it exists yet or not."""
    return RunFolder(Path(config.output_dir) / config.name)


def start_run(config: RunConfig) -> RunFolder | None:
    """The run whose weights this one starts from, if any."""
    init_from = config.stage.init_from
    return None if init_from is None else find_run(init_from, config.output_dir)


def evaluated_run(config: RunConfig) -> RunFolder:
    """The run that `config` names, with the checkpoint selected by checkpoint.use, for tasks that only read it."""
    run = find_run(config.name, config.output_dir)
    return replace(run, checkpoint=chosen_checkpoint(run, config.checkpoint.use))


def chosen_checkpoint(run: RunFolder, use: str | int | None = None) -> Path:
    """The checkpoint to take weights from: the one that `run` names, else selected by `use`, else by the run's own
    checkpoint.use. InputError for a run without checkpoints."""
    if run.checkpoint is not None:
        return run.checkpoint
    said = read_config(run.config).get("checkpoint", {}).get("use", "best") if use is None else use
    path = checkpoint.pick(run.checkpoints, said)
    if path is None:
        raise InputError(f"{run.path} has no checkpoint yet; train it until it saves one")
    return path


def load_run(model: Transformer, run: RunFolder, output_dir: str) -> None:
    """Load a run's weights into `model`; for a run with an adapter, the weights it started from with the adapter
    merged.

    For a QLoRA run, the adapter is merged into the dequantized 4-bit weights.
    """
    path = chosen_checkpoint(run)
    if not (path / ADAPTER_WEIGHTS).is_file():
        checkpoint.load_weights(path, model)
        return
    from pretune.adapters.attach import merge
    from pretune.adapters.files import attach_saved_adapter

    checkpoint.check(path)
    settings = read_config(run.config)
    load_run(model, find_run(settings["stage"]["init_from"], output_dir), output_dir)
    attach_saved_adapter(path, model)
    if settings["quantization"]["kind"] == "qlora_nf4":
        from pretune.quantization.nf4 import dequantize, quantize

        # The adapter was trained on 4-bit weights: merging it into their dequantized values gives the trained model.
        quantize(model, validate(QloraConfig, settings["quantization"]))
        dequantize(model)
    merge(model)
