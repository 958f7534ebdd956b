"""The loop: the same for pretraining and fine-tuning.

Every step accumulates gradients, clips, updates, measures and reports; at their intervals come evaluation, samples and
checkpoints. A checkpoint holds all of the state: `TrainingState`, weights, optimizer state and random generator state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from pretune.checkpoint.generators import generator_states, set_generator_states
from pretune.core.batch import Batch
from pretune.data.hashing import mix
from pretune.model.costs import training_flops
from pretune.objectives.objective import objective_of
from pretune.optim.budget import Step
from pretune.optim.optimizers import set_progress, update
from pretune.parallel.data_parallel import SharedGradients
from pretune.run.model import check_first_gradients
from pretune.run.reference_model import check_first_loss
from pretune.run.teacher import teacher_flops
from pretune.tasks.train.due import do_what_is_due, save_stopped, what_is_due
from pretune.tasks.train.gradients import StepGradients
from pretune.tasks.train.micro_batch import MicroBatch, choose_micro_batch
from pretune.tasks.train.monitor import Monitor
from pretune.tasks.train.qat import as_deployed, start_fake_quantization
from pretune.tasks.train.running import Run, peak_of
from pretune.tasks.train.state import step_to_come
from pretune.training.meter import Stopwatch
from pretune.training.prefetch import Prefetcher
from pretune.training.signals import Stop


def loop(run: Run) -> bool:
    """Train until the budget is spent (True) or a signal arrives (False), and save. Raises Diverged without saving.

    A signal ends a process alone wherever it is, and several together between two steps: none may leave the others
    alone in what they do together.
    """
    with run.interrupts.deferred() if run.processes.count > 1 else nullcontext():
        return _loop(run)


def _loop(run: Run) -> bool:
    config, state, model, optimizer = run.config, run.state, run.parts.model, run.optimizer
    random_state = generator_states(model)
    try:
        with run.timed("compilation"):
            micro_batch = choose(run)
            start_fake_quantization(config, model, state.progress)
            compile_now(run, micro_batch)
        processes = run.processes
        gradients = gradients_of(run, micro_batch)
        batches = Prefetcher(own_part(run), objective_of(config.stage.objective).count, run.parts.device)
        clock, window = Stopwatch(run.parts.device, run.instruments.clock), state.window
        flops = training_flops(model, config.data.sequence_length) + teacher_flops(config)
        window.mfu = flops / peak_of(run)
        monitor = Monitor(config, run.parts.device, state)
        while True:
            # At their intervals, and at the end of the budget: evaluate, sample, save.
            while due := what_is_due(run):
                state.seconds += clock.stop()
                do_what_is_due(run, due)
            if state.finished:
                return True
            if start_fake_quantization(config, model, state.progress):
                state.seconds += clock.stop()
                with run.timed("compilation"):
                    compile_now(run, micro_batch)
            clock.start()

            # Accumulate gradients, a micro-batch at a time, and clip them.
            step = next_step(run, micro_batch.size, clock.steps_behind)
            run.instruments.on_begin(run, step)
            fetched = batches.batch(state.position, step.tokens // config.data.sequence_length)
            batch, (scored, scored_tokens) = fetched.batch, processes.added(fetched.scored, fetched.scored_tokens)
            sums, norm = gradients.find(batch, scored, partial(seed, run, random_state))
            if state.step == 0 and scored:
                check_first_gradients(config, model)
                check_first_loss(config, sums["loss"], scored)

            # Update. A signal that arrives now is handled after the step is recorded.
            lr = set_progress(optimizer, config.optimizer, config.schedule, step.progress)
            with run.interrupts.shielded():
                skipped = update(optimizer, norm)
                optimizer.zero_grad(set_to_none=True)
                state.advance(step.tokens, config.data.sequence_length, clock.lap(), step.progress)
                if run.ema is not None:
                    run.ema.update(state.step, skipped)
                if processes.main:
                    run.trace.append(step)
                random_state = generator_states(model)

                # Measure and report.
                window.add_step(sums, skipped, scored, step.tokens, scored_tokens)
                run.tracker.progress(state.step, state.progress, window.shown_loss, window.speed)
                if state.step % config.log_every == 0 or state.finished:
                    state.training = window.metrics(state.seconds, lr, norm) | state.loss_scale.metrics()
                    run.tracker.report(state.step, {**state.totals(), **state.training})
                run.tracker.messages(monitor.warnings(state))
    except Stop:
        save_stopped(run, random_state)
        return False


def gradients_of(run: Run, micro_batch: MicroBatch) -> StepGradients:
    """What finds the gradients of a step."""
    shared = SharedGradients(run.parts.model, run.compilation.loss_of, run.processes, run.training.sharded)
    clip_norm, scale, say = run.config.optimizer.clip_norm, run.state.loss_scale, run.tracker.message
    return StepGradients(shared, run.parts.model, run.optimizer, micro_batch, clip_norm, scale, say, run.processes)


def own_part(run: Run) -> Callable[[int, int], Batch]:
    """Reads this process's share of the sequences of a step."""

    def read(position: int, num_sequences: int) -> Batch:
        start, count = run.processes.part(num_sequences)
        return run.loader.batch(position + start, count)

    return read


def next_step(run: Run, micro_batch: int, steps_behind: int) -> Step:
    """The step to come, which one of several processes decides; raises Stop in all of them if a signal has reached any.
    A process alone is stopped by signals at once."""
    processes = run.processes
    if processes.count > 1:
        processes.arrive(run.state.step)
        if processes.any(run.interrupts.pending):
            raise Stop
    rows = micro_batch * processes.count
    return processes.decided(step_to_come(run.config, run.state, run.replayed, rows, steps_behind))


def seed(run: Run, random_state: Mapping[str, Tensor]) -> None:
    """Set the random generators for a step: to where the previous one left them, or in each of several processes to
    what depends on the step and the rank alone."""
    if run.processes.count == 1:
        set_generator_states(run.parts.model, random_state)
    else:
        torch.manual_seed(mix(mix(run.config.seed + run.state.step) + run.processes.rank))


def choose(run: Run) -> MicroBatch:
    """The run's micro-batch: as configured, as remembered, or the largest that fits."""
    run.parts.model.train()
    random_state = generator_states(run.parts.model)

    def trial(size: int) -> None:
        run.optimizer.zero_grad(set_to_none=True)
        batch = run.loader.batch(0, size)
        with as_deployed(run.config, run.parts.model):  # fake quantization takes memory, even if it starts later
            # Memory is scarcer once there are gradients to add to.
            for _ in range(1 if run.config.is_step(size) else 2):
                run.compilation.passes(batch)

    try:
        count, say = run.processes.count, run.tracker.message
        found = choose_micro_batch(run.config, run.parts.device, run.folder.micro_batch, trial, say, processes=count)
        if count > 1:  # all with the same: they end a step together
            found.size, found.path = min(run.processes.gathered(found.size)), None
        return found
    finally:
        run.optimizer.zero_grad(set_to_none=True)
        set_generator_states(run.parts.model, random_state)


def compile_now(run: Run, micro_batch: MicroBatch) -> None:
    """Compile the step and the update, unless no step is left."""
    if not run.state.finished:
        run.compilation.ahead(run.loader.batch(0, micro_batch.size))
