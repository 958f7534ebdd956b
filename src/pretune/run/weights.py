"""Find the run and checkpoint to take weights from, and load them into a model."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from pretune.checkpoint import store as checkpoint
from pretune.checkpoint.identity import identity, with_identity
from pretune.core.config import ConfigError, InputError, validate
from pretune.core.files import ADAPTER_WEIGHTS
from pretune.model.transformer import Transformer
from pretune.quantization.config import QloraConfig
from pretune.run.config import RunConfig
from pretune.run.folder import RunFolder, find_run, read_config


def own_folder(config: RunConfig) -> RunFolder:
    """The folder of the run that `config` describes, whether it exists yet or not."""
    return RunFolder(Path(config.output_dir) / config.name)


def start_run(config: RunConfig) -> RunFolder | None:
    """The run, with its checkpoint, whose weights this one starts from, if any; for a run that has saved something,
    those that it started from.

    Raises InputError if they are not there.
    """
    init_from = config.stage.init_from
    if init_from is None:
        return None
    own = own_folder(config)
    newest = checkpoint.newest(own.checkpoints)
    if newest is not None:
        return _start_of(own, newest, init_from)
    run = _find_start(own, init_from)
    return replace(run, checkpoint=chosen_checkpoint(run))


def start_identity(config: RunConfig, newest: Path | None) -> str | None:
    """What identifies the weights that the run starts from, or started from before it saved `newest`; None for random
    ones.

    Raises ConfigError or InputError if stage.init_from now names other weights than then.
    """
    if newest is None:
        start = start_run(config)
        return None if start is None else _identity(start)
    own, now = own_folder(config), config.stage.init_from
    then, recorded = read_config(own.config).get("stage", {}).get("init_from"), recorded_start(newest)
    if (now is None) != (then is None):
        raise ConfigError(f"stage.init_from: {then} -> {now}: {own.path} did not start there; restore the old value")
    if now != then:
        start_run(config)
    return recorded


def recorded_start(path: Path) -> str | None:
    """What identifies the weights that the run of the checkpoint `path` started from; None for random ones."""
    state = checkpoint.state_of(path)
    if "start" not in state:
        raise InputError(
            f"{path} was written by another version of Pretune, and does not say which weights it started from; use "
            "that version for it"
        )
    return state["start"]


def _start_of(run: RunFolder, path: Path, init_from: str) -> RunFolder:
    """The run, with its checkpoint, whose weights the checkpoint `path` of `run` started from."""
    recorded, start = recorded_start(path), _find_start(run, init_from)
    found = None if recorded is None else with_identity(start.checkpoints, recorded)
    if found is None:
        raise InputError(
            f"{run.path} started from other weights than {start.path} has now (it was trained again, or is another run "
            "of that name); restore that run, or set stage.init_from to where its weights are"
        )
    return replace(start, checkpoint=found)


def _find_start(run: RunFolder, init_from: str) -> RunFolder:
    """The run that `run` starts from: by its name, or at its path, or moved together with `run`."""
    runs = run.path.parent
    try:
        return find_run(init_from, str(runs))
    except InputError as error:
        parts = Path(init_from).parts
        for moved in (parts[-1:], parts[-3:]):  # a run, a checkpoint of a run
            with contextlib.suppress(InputError):
                return find_run(str(runs.joinpath(*moved)), str(runs))
        raise InputError(f"stage.init_from: {error}") from None


def _identity(run: RunFolder) -> str:
    return identity(chosen_checkpoint(run))


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


def load_run(model: Transformer, run: RunFolder, init_from: str | None = None) -> str:
    """Load a run's weights into `model`; for a run with an adapter, the weights it started from with the adapter
    merged. Returns what identifies them.

    For a QLoRA run, the adapter is merged into the dequantized 4-bit weights. `init_from`: where to look for the
    weights that it started from, if not where its own configuration says. Raises InputError if they are not there.
    """
    path = chosen_checkpoint(run)
    if not (path / ADAPTER_WEIGHTS).is_file():
        checkpoint.load_weights(path, model)
        return identity(path)
    from pretune.adapters.attach import merge
    from pretune.adapters.files import attach_saved_adapter

    checkpoint.check(path)
    settings = read_config(run.config)
    base = load_run(model, _start_of(run, path, init_from or settings["stage"]["init_from"]))
    attach_saved_adapter(path, model, base)
    if settings["quantization"]["kind"] == "qlora_nf4":
        from pretune.quantization.nf4 import dequantize, quantize

        # The adapter was trained on 4-bit weights: merging it into their dequantized values gives the trained model.
        quantize(model, validate(QloraConfig, settings["quantization"]))
        dequantize(model)
    merge(model)
    return identity(path)
