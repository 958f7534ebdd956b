"""The loop: the same for pretraining and fine-tuning.

Once in a while it evaluates, samples, saves; every step it accumulates gradients, clips and updates, measures and
reports. A checkpoint holds all of its state: `Progress`, the weights, the optimizer's state and the random generator.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pretune import checkpoint
from pretune.assembly import (
    Parts,
    assemble,
    attach_adapter,
    check_first_gradients,
    own_folder,
    quantize_frozen,
    scorer,
    start_run,
    stored_adapter,
    training_loss,
)
from pretune.batch import Batch
from pretune.data.loader import Loader
from pretune.data.mixture import Mixture, training_rows
from pretune.guards import EXIT_STOPPED, Interrupts, Stop
from pretune.hardware import peak_flops
from pretune.meter import Stopwatch, Window
from pretune.model.costs import training_flops
from pretune.model.counts import count_parameters
from pretune.optim.budget import Spent, finished, progress
from pretune.optim.optimizers import build_optimizer, clip_gradients, set_learning_rate
from pretune.optim.schedules import schedule_factor
from pretune.run_config import RunConfig
from pretune.run_folder import RunFolder
from pretune.tasks.evaluate import evaluate
from pretune.tasks.generate import sample
from pretune.tasks.report import report
from pretune.tasks.train_micro_batch import MicroBatch, accumulate, choose_micro_batch
from pretune.tracker.tracker import Tracker


@dataclass
class Progress:
    """How far the run has come: what a checkpoint stores beside tensors."""

    step: int = 0
    tokens: int = 0
    """Input tokens read."""
    seconds: float = 0.0
    """Training time; evaluation, sampling, checkpoints and compilation are not in it."""
    step_seconds: float = 0.0
    """What a step takes of late: the budget must know which step is the last that fits."""
    position: int = 0
    """Rows of the training set read, over all epochs."""
    evaluated_at: int = -1
    """Step of the newest evaluation, so that none is repeated or left out after a resume."""
    sampled_at: int = -1
    validation: dict[str, float] = field(default_factory=dict)
    """Figures of the newest evaluation."""
    training: dict[str, float] = field(default_factory=dict)
    """Figures of the newest report."""

    def spent(self) -> Spent:
        return Spent(self.step, self.tokens, self.seconds)

    def step_cost(self) -> Spent:
        """What the next step will take of the budget."""
        return Spent(1, self.tokens // max(self.step, 1), self.step_seconds)

    def totals(self) -> dict[str, float]:
        """What every row of figures is plotted against, besides its step."""
        return {"tokens": self.tokens, "seconds": round(self.seconds, 3)}

    def advance(self, batch: Batch, seconds: float) -> None:
        """One more step, which read `batch` and took `seconds`."""
        self.step += 1
        self.tokens += batch.inputs.numel()
        self.position += len(batch.inputs)
        self.seconds += seconds
        weight = max(0.1, 1 / self.step)
        self.step_seconds += weight * (seconds - self.step_seconds)


def train(config: RunConfig, mapping: Mapping[str, Any]) -> int:
    """Train the run that `config` describes, from its newest checkpoint if it has one.

    Returns 0 when the run is complete and EXIT_STOPPED when a signal ended it with everything saved. Raises
    ConfigError and InputError, before anything is written, for what the user can mend.
    """
    folder = own_folder(config)
    folder.check(mapping, config.resume)
    if (figures := folder.complete()) is not None:
        print(f"{folder.path} is complete ({figures['step']} steps): nothing is left to train. {next_commands(folder)}")
        return 0
    with Interrupts() as interrupts:
        try:
            return _train(config, mapping, folder, interrupts)
        except Stop:
            print("stopped before the first step with nothing lost; run the same command to go on.")
            return EXIT_STOPPED


def _train(config: RunConfig, mapping: Mapping[str, Any], folder: RunFolder, interrupts: Interrupts) -> int:
    # Jobs of a sweep share the process, and torch.compile gives up on a function after a few different models.
    torch.compiler.reset()
    torch.manual_seed(config.seed)
    newest = checkpoint.newest(folder.checkpoints)
    parts = assemble(config, folder if newest and config.adapter.kind == "none" else start_run(config))
    lr_factors = attach_adapter(config, parts.model, newest)
    quantize_frozen(config, parts.model)
    loader = training_rows(parts.data, config.data, config.seed)
    # Last, so that it sees the parameters that are really trained.
    optimizer = build_optimizer(config.optimizer, parts.model, lr_factors)
    state = Progress()
    if newest is not None:
        adapter = stored_adapter(config, parts.model)
        state = Progress(**checkpoint.load(newest, parts.model, optimizer, adapter=adapter))
    with interrupts.shielded():
        folder.claim(mapping)
        parts.tokenizer.save(folder.tokenizer)
    with Tracker(config.tracker, folder.path, config.name, config.stage.kind, mapping) as tracker:
        tracker.rewind(state.step if newest else -1)
        tracker.message(opening(config, parts, loader, state))
        run = Run(config, folder, parts, optimizer, loader, state, tracker, interrupts)
        if not loop(run):
            tracker.message(f"stopped at step {state.step}; everything is saved, run the same command to go on.")
            return EXIT_STOPPED
        tracker.finish(summary(run))
    report([folder.path], folder.path)
    print(next_commands(folder))
    return 0


@dataclass(frozen=True)
class Run:
    """The parts of a run under way."""

    config: RunConfig
    folder: RunFolder
    parts: Parts
    optimizer: Optimizer
    loader: Loader | Mixture
    state: Progress
    tracker: Tracker
    interrupts: Interrupts

    def saved_at(self) -> int | None:
        """Step of the newest checkpoint."""
        newest = checkpoint.newest(self.folder.checkpoints)
        return None if newest is None else checkpoint.step_of(newest)


def loop(run: Run) -> bool:
    """Train until the budget ends (True) or a signal does (False); everything is saved either way."""
    config, state, model, optimizer = run.config, run.state, run.parts.model, run.optimizer
    num_rows = config.batch.tokens // config.data.sequence_length
    random_state = checkpoint.random_state(model)
    try:
        loss_of = training_loss(config, run.parts)
        micro_batch = choose(run, loss_of)
        compile_ahead(run, loss_of, micro_batch)
        flops = training_flops(model, config.data.sequence_length)
        mfu = flops / peak_flops(run.parts.device, config.precision.compute)
        clock, window = Stopwatch(run.parts.device), Window(since=state.seconds, mfu=mfu)
        while True:
            # Once in a while: evaluate, sample, save. At the end of the budget all of them, by the same code.
            last = finished(config.budget, state.spent(), state.step_cost())
            state.seconds += clock.stop()
            do_what_is_due(run, last)
            if last:
                return True
            clock.start()

            # Accumulate gradients, a micro-batch at a time.
            batch = run.loader.batch(state.position, num_rows)
            scored = max(batch.num_scored(), 1)
            window.add_loss(accumulate(loss_of, optimizer, batch, scored, micro_batch))

            if state.step == 0 and batch.num_scored():
                check_first_gradients(config, model)

            # Clip and update. A signal in the middle of the update waits for its end.
            share = progress(config.budget, state.spent(), state.step_cost())
            lr = set_learning_rate(optimizer, schedule_factor(config.schedule, share))
            norm = clip_gradients(model, config.optimizer.clip_norm)
            with run.interrupts.shielded():
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                state.advance(batch, clock.lap())
                random_state = checkpoint.random_state(model)

            # Measure and report.
            window.add_step(batch.inputs.numel(), scored)
            spent, cost = state.spent(), state.step_cost()
            run.tracker.progress(state.step, progress(config.budget, spent, cost), window.shown_loss, window.speed)
            if state.step % config.report_every == 0 or finished(config.budget, spent, cost):
                state.training = window.figures(state.seconds, lr, norm)
                run.tracker.report(state.step, {**state.totals(), **state.training})
    except Stop:
        # The step that was interrupted has not touched the weights: it is as if it had not begun.
        save(run, random_state)
        return False


def do_what_is_due(run: Run, last: bool) -> None:
    """Evaluate, sample and save, each on its own cadence, and all of them at the end."""
    config, state = run.config, run.state

    def due(every: int | None, done_at: int | None, at_start: bool) -> bool:
        on_cadence = at_start if state.step == 0 else bool(every) and state.step % every == 0
        return (last or on_cadence) and done_at != state.step

    if due(config.evaluation.every, state.evaluated_at, config.evaluation.at_start):
        state.validation = evaluate(config, run.parts, scorer(config, run.parts))
        state.evaluated_at = state.step
        run.tracker.report(state.step, {**state.totals(), **state.validation})
    if due(config.samples.every, state.sampled_at, False):
        for prompt, text in zip(config.samples.prompts, sample(config, run.parts), strict=True):
            run.tracker.sample(state.step, prompt, text)
        state.sampled_at = state.step
    if due(config.checkpoint.every, run.saved_at(), False):
        save(run, checkpoint.random_state(run.parts.model))


def save(run: Run, random_state: Mapping[str, Tensor]) -> None:
    """Save the run as it is at the end of its newest step, unless it is saved already."""
    with run.interrupts.shielded():
        if run.saved_at() != run.state.step:
            folder, keep = run.folder.checkpoints, run.config.checkpoint.keep
            model, adapter = run.parts.model, stored_adapter(run.config, run.parts.model)
            state = asdict(run.state)
            checkpoint.save(
                folder, run.state.step, model, run.optimizer, state, keep, adapter=adapter, random=random_state
            )


def choose(run: Run, loss_of: Callable[[Batch], Tensor]) -> MicroBatch:
    """The micro-batch of the run: as configured, as remembered, or the largest that fits."""
    run.parts.model.train()
    random_state = checkpoint.random_state(run.parts.model)

    def trial(rows: int) -> None:
        run.optimizer.zero_grad(set_to_none=True)
        batch = run.loader.batch(0, rows)
        for _ in range(2):  # memory is scarcer once there are gradients to add to
            loss_of(batch).backward()

    try:
        return choose_micro_batch(run.config, run.parts.device, run.folder.micro_batch, trial)
    finally:
        run.optimizer.zero_grad(set_to_none=True)
        checkpoint.set_random_state(run.parts.model, random_state)


def compile_ahead(run: Run, loss_of: Callable[[Batch], Tensor], micro_batch: MicroBatch) -> None:
    """Compile the forward and backward pass on a batch that is then forgotten, so that no budget pays for it."""
    run.parts.model.train()
    if not run.config.precision.compile or finished(run.config.budget, run.state.spent(), run.state.step_cost()):
        return
    run.tracker.message("compiling the training step (once; precision.compile=false skips it) ...")
    started, random_state = time.perf_counter(), checkpoint.random_state(run.parts.model)
    batch = run.loader.batch(0, micro_batch.rows)
    loss_of(batch).backward()
    run.optimizer.zero_grad(set_to_none=True)
    checkpoint.set_random_state(run.parts.model, random_state)
    run.tracker.message(f"compiled in {time.perf_counter() - started:.0f} s")


def opening(config: RunConfig, parts: Parts, loader: Loader | Mixture, state: Progress) -> str:
    """What is about to be trained, on what, from where."""
    batch, epoch = config.batch.tokens, loader.num_rows * config.data.sequence_length
    start = f"from {config.stage.init_from}" if config.stage.init_from else "from random weights"
    if state.step:
        start = f"resumed at step {state.step:,}"
    counts, adapter = count_parameters(parts.model), config.adapter.kind
    trained = f" ({adapter}: {counts.trainable:,} trained, {counts.trainable / counts.total:.2%})"
    return (
        f"{config.stage.kind} {config.name}: {counts.total:,} parameters"
        f"{'' if adapter == 'none' else trained} on {parts.device}, {start}; "
        + "; ".join([f"{epoch:,} tokens an epoch, {batch:,} a step", *loader.notes()])
    )


def summary(run: Run) -> dict[str, Any]:
    """The run's final figures."""
    state = run.state
    return {
        **state.totals(),
        "step": state.step,
        "epochs": state.position / run.loader.num_rows,
        **run.loader.figures(),
        "parameters": count_parameters(run.parts.model).total,
        "trainable_parameters": count_parameters(run.parts.model).trainable,
        "device": str(run.parts.device),
        **state.training,
        **state.validation,
    }


def next_commands(folder: RunFolder) -> str:
    """What a user may want to do with a run that is complete."""
    command = f"python src/main.py --config {folder.config}"
    return f"Look at {folder.path / 'report.html'}, or let it write: {command} task=generate 'generate.prompt=...'"
