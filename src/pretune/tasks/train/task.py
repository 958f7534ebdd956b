"""task=train: assemble a run, train it from its newest checkpoint, and complete it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from pretune.checkpoint import store as checkpoint
from pretune.checkpoint.recovery import newest_whole
from pretune.core.files import atomic_folder
from pretune.core.terminal import say, warn
from pretune.data.loader import Loader
from pretune.data.mixture import Mixture, training_loader
from pretune.model.counts import count_parameters
from pretune.optim.trace import Trace
from pretune.run.assembly import assemble_training
from pretune.run.config import RunConfig
from pretune.run.folder import RunFolder
from pretune.run.given_adapter import notes_on_adapter
from pretune.run.model import stored_adapter
from pretune.run.parts import Parts
from pretune.run.precision import Resolved, print_notes, resolve
from pretune.run.teacher import teacher_identity
from pretune.run.tokenizer import notes_on_template
from pretune.run.weights import check_model, own_folder, start_identity, start_of
from pretune.tasks.evaluate.task import Evaluator
from pretune.tasks.report.task import PAGE, report
from pretune.tasks.train.loop import Instruments, Run, loop, used_parts
from pretune.tasks.train.qat import check_start, converted_metrics
from pretune.tasks.train.state import TrainingState, replayed_steps
from pretune.tracker.tracker import Tracker
from pretune.training.divergence import EXIT_DIVERGED, Diverged, what_to_try
from pretune.training.early_stopping import best, why_stopped
from pretune.training.meter import peak_memory
from pretune.training.signals import EXIT_STOPPED, Interrupts, stoppable


def train(config: RunConfig, mapping: Mapping[str, Any], instruments: Instruments | None = None) -> int:
    """Train the run that `config` describes, from its newest checkpoint if it has one.

    Returns 0 when the run is complete, EXIT_STOPPED when a signal ended it with everything saved, and EXIT_DIVERGED
    when it has diverged. Raises ConfigError and InputError, before anything is written, for what the user can mend.
    """
    folder = own_folder(config)
    resolved = resolve(config, folder)
    mapping = resolved.recorded(mapping)
    folder.check(mapping, config.resume)
    if (finished := folder.complete()) is not None:
        if not (folder.path / PAGE).is_file():  # the run was killed between the two
            _report(config, folder)
        say(f"{folder.path} is complete ({finished['step']} steps): nothing is left to train. {next_commands(folder)}")
        return 0
    print_notes(resolved)
    stopped = "stopped with nothing lost; run the same command to resume."
    watched_with = instruments or Instruments()
    try:
        return stoppable(lambda interrupts: _train(resolved, mapping, folder, interrupts, watched_with), stopped)
    except Diverged as error:
        newest = checkpoint.newest(folder.checkpoints)
        warn(what_to_try(error, newest and checkpoint.step_of(newest), config.name))
        return EXIT_DIVERGED


def _train(
    resolved: Resolved,
    mapping: Mapping[str, Any],
    folder: RunFolder,
    interrupts: Interrupts,
    instruments: Instruments,
) -> int:
    config = resolved.config
    # Jobs of a sweep share the process, and torch.compile gives up on a function after a few different models.
    torch.compiler.reset()
    torch.manual_seed(config.seed)
    replayed = replayed_steps(config)
    newest, said = newest_whole(folder.checkpoints)
    for line in said:
        warn(line)
    start, teacher = start_identity(config, newest), teacher_identity(config)
    if newest is None:
        _check_start(config)
    training = assemble_training(config, newest)
    parts, data = training.parts, training.parts.data.fingerprints()
    state = TrainingState(data, start, parts.tokenizer.fingerprint, teacher)
    loader = training_loader(parts.data, config.data, config.seed)
    if newest is not None:
        averaged = training.ema and training.ema.model
        adapter = stored_adapter(config, averaged or parts.model)
        stored = checkpoint.load(newest, parts.model, training.optimizer, adapter=adapter, averaged=averaged)
        state = TrainingState.of(stored, newest)
        state.check_data(data, config.name)
    state.loss_scale = state.loss_scale.for_activations(config.precision.activations)
    with (
        folder.claimed(mapping, newest),
        Tracker(config.tracker, folder.path, config.name, config.stage.kind, mapping) as tracker,
    ):
        with interrupts.shielded():
            if not folder.tokenizer.is_dir():
                with atomic_folder(folder.tokenizer) as temporary:
                    parts.tokenizer.save(temporary)
        tracker.rewind(state.step if newest else -1, state.recorded)
        trace = Trace(folder.progress)
        if not trace.rewind(state.step, state.recorded):
            tracker.message(f"note: {folder.progress} is not what the run wrote: the run cannot be replayed exactly")
        tracker.message(opening(resolved, parts, loader, state))
        # On a GPU, evaluations are many and compiling them is quick; on a CPU it takes longer than it saves.
        compiled = config.precision.compile and parts.device.type != "cpu"
        evaluator = Evaluator(config, parts, compiled, tracker.message)
        run = Run(config, folder, training, loader, evaluator, state, tracker, interrupts, trace, replayed, instruments)
        if not loop(run):
            tracker.message(how_stopped(run))
            return EXIT_STOPPED
        with run.timed("evaluation"):
            newest = replace(folder, checkpoint=checkpoint.newest(folder.checkpoints))
            converted = converted_metrics(config, used_parts(run), newest, tracker.message)
        metrics = summary(run) | converted
        if metrics["stopped_early"]:
            tracker.message(why_stopped(state.losses, config.early_stopping.min_delta))
        with interrupts.shielded():  # what is complete has a report
            tracker.finish(metrics)
            _report(config, folder)
    say(next_commands(folder))
    return 0


def _check_start(config: RunConfig) -> None:
    """Raise ConfigError if the run cannot start from the weights that it names; say in what it differs from them."""
    start = start_of(config)
    if start is not None:
        check_start(config, start)
        for line in (*check_model(config, start), *notes_on_adapter(config, start.name)):
            warn(f"note: {line}")


def opening(resolved: Resolved, parts: Parts, loader: Loader | Mixture, state: TrainingState) -> str:
    """One line: the model, the device, the starting weights and the data, with what is wrong with it."""
    config = resolved.config
    batch, epoch = config.batch.tokens, loader.num_sequences * config.data.sequence_length
    start = f"from {config.stage.init_from}" if config.stage.init_from else "from random weights"
    if state.step:
        start = f"resumed at step {state.step:,}"
    counts, adapter = count_parameters(parts.model), config.adapter.kind
    notes = (*parts.data.notes, *notes_on_template(config, parts.tokenizer))
    trained = f" ({adapter}: {counts.trainable:,} trained, {counts.trainable / counts.total:.2%})"
    return (
        f"{config.stage.kind} {config.name}: {counts.total:,} parameters"
        f"{'' if adapter == 'none' else trained} on {parts.device} in {resolved}, {start}; "
        + "; ".join([f"{epoch:,} tokens per epoch, {batch:,} per step", *added(config, parts), *loader.notes(), *notes])
    )


def added(config: RunConfig, parts: Parts) -> Iterator[str]:
    """The tokens that the run adds, and what becomes of their rows."""
    ids = [*parts.tokenizer.added_ids]
    if not ids:
        return
    rows = {
        "none": "frozen" if not config.adapter.adapts_vocabulary else "adapted",
        "new_rows": "trained beside the adapter",
        "all": "trained beside the adapter, with all others",
    }[config.adapter.trained_embeddings(True)]
    names = ", ".join(str(parts.tokenizer.backend.id_to_token(one)) for one in ids[:4])
    more = f" and {len(ids) - 4} more" if len(ids) > 4 else ""
    yield (
        f"{len(ids)} new tokens ({names}{more}: {ids[0]:,} to {ids[-1]:,}), whose rows are "
        f"{rows if config.adapter.freezes else 'trained'}"
    )


def how_stopped(run: Run) -> str:
    """One line for a run that a signal ended."""
    stopped = f"stopped at step {run.state.step:,}"
    if run.saved:
        return f"{stopped}; everything is saved, run the same command to resume."
    newest = checkpoint.newest(run.folder.checkpoints)
    start = "begin again" if newest is None else f"resume from step {checkpoint.step_of(newest):,}"
    return (
        f"{stopped}, after {run.state.failed:,} steps without a finite loss and gradient: this is not saved, and the "
        f"same command will {start}."
    )


def summary(run: Run) -> dict[str, Any]:
    """The run's final metrics."""
    state, lowest = run.state, best(run.state.losses)
    return {
        **state.totals(),
        "step": state.step,
        "stopped_early": state.stopped_early,
        "best_step": lowest and lowest[0],
        "best_val_loss": lowest and lowest[1],
        "epochs": state.position / run.loader.num_sequences,
        **run.loader.metrics(),
        "parameters": count_parameters(run.parts.model).total,
        "trainable_parameters": count_parameters(run.parts.model).trainable,
        "data": state.data,
        "device": str(run.parts.device),
        "peak_memory_bytes": peak_memory(run.parts.device),
        **state.training,
        **state.validation,
    }


def _report(config: RunConfig, folder: RunFolder) -> None:
    if config.report.after_training:
        report([folder.path], folder.path)


def next_commands(folder: RunFolder) -> str:
    """Next commands for a run that is complete."""
    command = f"python src/main.py --config {folder.config}"
    look = f"Look at {page}" if (page := folder.path / PAGE).is_file() else f"Make the report: {command} task=report"
    return f"{look}, or generate text: {command} task=generate 'generate.prompt=...'"
