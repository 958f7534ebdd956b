"""task=train: assemble a run, train it from its newest checkpoint, and complete it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pretune.checkpoint import store as checkpoint
from pretune.checkpoint.recovery import newest_whole
from pretune.compute.device import pick_device
from pretune.core.files import atomic_folder
from pretune.core.terminal import say, warn
from pretune.data.loader import Loader
from pretune.data.mixture import Mixture, training_loader
from pretune.model.counts import count_parameters
from pretune.optim.trace import Trace
from pretune.parallel.processes import Processes, joined
from pretune.run.assembly import Training, assemble_training
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
from pretune.tasks.train.loop import loop
from pretune.tasks.train.qat import check_start, converted_metrics
from pretune.tasks.train.ranks import in_summary, measured_speeds, said_of_memory, said_of_speeds
from pretune.tasks.train.running import Instruments, Run, used_parts
from pretune.tasks.train.spread import check_share, spread
from pretune.tasks.train.state import TrainingState, replayed_steps
from pretune.tracker.environment import code_fingerprint
from pretune.tracker.tracker import NoTracker, Tracker
from pretune.training.divergence import EXIT_DIVERGED, Diverged, what_to_try
from pretune.training.early_stopping import best, why_stopped
from pretune.training.signals import EXIT_STOPPED, Interrupts, stoppable


def train(config: RunConfig, mapping: Mapping[str, Any], instruments: Instruments | None = None) -> int:
    """Train the run that `config` describes, from its newest checkpoint if it has one.

    Returns 0 when the run is complete, EXIT_STOPPED when a signal ended it with everything saved, and EXIT_DIVERGED
    when it has diverged. Raises ConfigError and InputError, before anything is written, for what the user can mend.
    """
    folder, watched_with = own_folder(config), instruments or Instruments()

    def work(interrupts: Interrupts) -> int:
        with joined(config.parallel, pick_device(config.device)) as processes:
            resolved = _resolved(config, mapping, folder, processes)
            if resolved is None:
                return 0
            resolved = spread(resolved, processes)
            try:
                return _train(resolved, resolved.recorded(mapping), folder, interrupts, watched_with, processes)
            except Diverged as error:
                newest = checkpoint.newest(folder.checkpoints)
                warn(what_to_try(error, newest and checkpoint.step_of(newest), config.name))
                return EXIT_DIVERGED

    return stoppable(work, "stopped with nothing lost; run the same command to resume.")


def _resolved(
    config: RunConfig, mapping: Mapping[str, Any], folder: RunFolder, processes: Processes
) -> Resolved | None:
    """How the run computes, the same in all processes; None if there is nothing left to train."""
    processes.check_same("the configuration", mapping)
    processes.check_same("the code", code_fingerprint())
    check_share(config, processes)
    if not processes.main:
        finished, precision = processes.decided((False, config.precision))
        return None if finished else resolve(config.model_copy(update={"precision": precision}), folder)
    resolved = resolve(config, folder)
    folder.check(resolved.recorded(mapping), config.resume)
    finished = folder.complete()
    if finished is None:
        print_notes(resolved)
    processes.decided((finished is not None, resolved.config.precision))
    if finished is None:
        return resolved
    if not (folder.path / PAGE).is_file():  # the run was killed between the two
        _report(config, folder)
    say(f"{folder.path} is complete ({finished['step']} steps): nothing is left to train. {next_commands(folder)}")
    return None


def _train(
    resolved: Resolved,
    mapping: Mapping[str, Any],
    folder: RunFolder,
    interrupts: Interrupts,
    instruments: Instruments,
    processes: Processes,
) -> int:
    config = resolved.config
    # Jobs of a sweep share the process, and torch.compile gives up on a function after a few different models.
    torch.compiler.reset()
    torch.manual_seed(config.seed)
    replayed = replayed_steps(config)
    newest = processes.decided(_newest(folder) if processes.main else None)
    start, teacher = start_identity(config, newest), teacher_identity(config)
    if newest is None:
        _check_start(config)
    training = assemble_training(config, newest, processes)
    parts = training.parts
    state = TrainingState(parts.data.fingerprints(), start, parts.tokenizer.fingerprint, teacher)
    state = state if newest is None else _loaded(config, training, newest)
    state.loss_scale = state.loss_scale.for_activations(config.precision.activations)
    loader = training_loader(parts.data, config.data, config.seed)
    main, told = processes.main, (folder.path, config.name, config.stage.kind, mapping)
    with (
        folder.claimed(mapping, newest) if main else nullcontext(),
        Tracker(config.tracker, *told) if main else NoTracker() as tracker,
    ):
        with interrupts.shielded(), processes.main_alone():
            if main and not folder.tokenizer.is_dir():
                with atomic_folder(folder.tokenizer) as temporary:
                    parts.tokenizer.save(temporary)
        tracker.rewind(state.step if newest else -1, state.recorded)
        trace = Trace(folder.progress)
        if main and not trace.rewind(state.step, state.recorded):
            tracker.message(f"note: {folder.progress} is not what the run wrote: the run cannot be replayed exactly")
        tracker.message(opening(resolved, parts, loader, state, processes.count))
        speeds = measured_speeds(config, parts, processes)
        tracker.messages(said_of_speeds(speeds))
        # On a GPU, evaluations are many and compiling them is quick; on a CPU it takes longer than it saves.
        compiled = config.precision.compile and parts.device.type != "cpu" and not training.sharded
        evaluator = Evaluator(config, parts, compiled, tracker.message, processes)
        run = Run(
            config, folder, training, loader, evaluator, state, tracker, interrupts, trace, replayed, instruments,
            processes,
        )  # fmt: skip
        if not loop(run):
            interrupts.ignore()
            tracker.message(how_stopped(run))
            return EXIT_STOPPED
        metrics = _final_metrics(run) | in_summary(parts, processes, speeds)
        tracker.messages(said_of_memory(metrics))
        with interrupts.shielded():  # what is complete has a report
            tracker.finish(metrics)
            if main:
                _report(config, folder)
    say(next_commands(folder))
    return 0


def _newest(folder: RunFolder) -> Path | None:
    """The checkpoint to go on from; says what is set aside for it."""
    newest, said = newest_whole(folder.checkpoints)
    for line in said:
        warn(line)
    return newest


def _loaded(config: RunConfig, training: Training, newest: Path) -> TrainingState:
    """Load a checkpoint into the parts of the run; return its state."""
    parts, averaged = training.parts, training.ema and training.ema.model
    adapter = stored_adapter(config, averaged or parts.model)
    stored = checkpoint.load(newest, parts.model, training.optimizer, adapter=adapter, averaged=averaged)
    state = TrainingState.of(stored, newest)
    state.check_data(parts.data.fingerprints(), config.name)
    return state


def _check_start(config: RunConfig) -> None:
    """Raise ConfigError if the run cannot start from the weights that it names; say in what it differs from them."""
    start = start_of(config)
    if start is not None:
        check_start(config, start)
        for line in (*check_model(config, start), *notes_on_adapter(config, start.name)):
            warn(f"note: {line}")


def opening(
    resolved: Resolved, parts: Parts, loader: Loader | Mixture, state: TrainingState, processes: int = 1
) -> str:
    """One line: the model, the device, the starting weights and the data, with what is wrong with it."""
    config = resolved.config
    batch, epoch = config.batch.tokens, loader.num_sequences * config.data.sequence_length
    start = f"from {config.stage.init_from}" if config.stage.init_from else "from random weights"
    if state.step:
        start = f"resumed at step {state.step:,}"
    together = f" in {processes} processes ({config.parallel.kind})" if processes > 1 else ""
    counts, adapter = count_parameters(parts.model), config.adapter.kind
    notes = (*parts.data.notes, *notes_on_template(config, parts.tokenizer))
    trained = f" ({adapter}: {counts.trainable:,} trained, {counts.trainable / counts.total:.2%})"
    return (
        f"{config.stage.kind} {config.name}: {counts.total:,} parameters"
        f"{'' if adapter == 'none' else trained} on {parts.device}{together} in {resolved}, {start}; "
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


def _final_metrics(run: Run) -> dict[str, Any]:
    """The run's summary, with what its weights are as integers; says why a run has stopped early."""
    config, state = run.config, run.state
    with run.timed("evaluation"):
        newest = replace(run.folder, checkpoint=checkpoint.newest(run.folder.checkpoints))
        converted = converted_metrics(config, used_parts(run), newest, run.tracker.message)
    metrics = summary(run) | converted
    if metrics["stopped_early"]:
        run.tracker.message(why_stopped(state.losses, config.early_stopping.min_delta))
    return metrics


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
