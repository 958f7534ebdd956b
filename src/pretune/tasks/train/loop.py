"""The loop: the same for pretraining and fine-tuning.

Every step accumulates gradients, clips, updates, measures and reports; at their intervals come evaluation, samples and
checkpoints. A checkpoint holds all of the state: `TrainingState`, weights, optimizer state and random generator state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from pretune.checkpoint import store as checkpoint
from pretune.compute.config import Activations
from pretune.compute.hardware import peak_flops
from pretune.core.named_tensors import not_finite
from pretune.data.loader import Loader
from pretune.data.mixture import Mixture
from pretune.model.build import Model
from pretune.model.costs import training_flops
from pretune.objectives.objective import objective_of
from pretune.optim.budget import Step
from pretune.optim.config import Overhead
from pretune.optim.optimizers import set_progress, update
from pretune.optim.trace import Trace
from pretune.run.assembly import Training
from pretune.run.config import RunConfig
from pretune.run.folder import RunFolder
from pretune.run.model import check_first_gradients, stored_adapter
from pretune.run.parts import Parts
from pretune.run.reference_model import check_first_loss
from pretune.run.teacher import teacher_flops
from pretune.tasks.evaluate.task import Evaluator
from pretune.tasks.generate.task import sample
from pretune.tasks.train.compilation import Compilation
from pretune.tasks.train.gradients import StepGradients
from pretune.tasks.train.micro_batch import MicroBatch, choose_micro_batch
from pretune.tasks.train.monitor import Monitor
from pretune.tasks.train.qat import as_deployed, float_metrics, start_fake_quantization
from pretune.tasks.train.state import TrainingState, step_to_come
from pretune.tracker.tracker import Tracker
from pretune.training.divergence import Diverged
from pretune.training.early_stopping import best, out_of_patience
from pretune.training.ema import EMA
from pretune.training.meter import Stopwatch
from pretune.training.prefetch import Prefetcher
from pretune.training.signals import Interrupts, Stop


@dataclass(frozen=True)
class Instruments:
    """The clock, the peak speed and the hook of a run."""

    clock: Callable[[], float] = time.perf_counter
    """Seconds from an arbitrary origin."""
    peak_flops: Callable[[torch.device, set[Activations]], float] = peak_flops
    """The peak FLOP/s of a device in the fastest of these precisions."""
    on_begin: Callable[[Run, Step | Overhead], None] = lambda run, what: None
    """Called when a step, or overhead such as an evaluation, begins; its time already counts."""


@dataclass(frozen=True)
class Run:
    """The parts of a run in progress."""

    config: RunConfig
    folder: RunFolder
    training: Training
    loader: Loader | Mixture
    evaluator: Evaluator
    state: TrainingState
    tracker: Tracker
    interrupts: Interrupts
    trace: Trace
    replayed: list[Step] | None
    """The steps to take, if another run is replayed."""
    instruments: Instruments

    @property
    def parts(self) -> Parts:
        return self.training.parts

    @property
    def ema(self) -> EMA[Model] | None:
        return self.training.ema

    @property
    def optimizer(self) -> Optimizer:
        return self.training.optimizer

    @cached_property
    def compilation(self) -> Compilation:
        model, message = self.parts.model, self.tracker.message
        return Compilation(self.config, model, self.optimizer, self.training.loss_of, message)

    @contextmanager
    def timed(self, kind: Overhead) -> Iterator[None]:
        """Count the time of the block as overhead."""
        with self.state.timed(kind, self.instruments.clock):
            self.instruments.on_begin(self, kind)
            yield

    @property
    def saved(self) -> bool:
        """Whether the run is saved as it is after its newest step."""
        return checkpoint.is_saved(self.folder.checkpoints, self.state.step)


def loop(run: Run) -> bool:
    """Train until the budget is spent (True) or a signal arrives (False), and save. Raises Diverged without saving."""
    config, state, model, optimizer = run.config, run.state, run.parts.model, run.optimizer
    random_state, say = checkpoint.random_state(model), run.tracker.message
    try:
        with run.timed("compilation"):
            micro_batch = choose(run)
            start_fake_quantization(config, model, state.progress)
            compile_now(run, micro_batch)
        clip_norm, loss_of = config.optimizer.clip_norm, run.compilation.loss_of
        gradients = StepGradients(loss_of, model, optimizer, micro_batch, clip_norm, state.loss_scale, say)
        batches = Prefetcher(run.loader.batch, objective_of(config.stage.objective).count, run.parts.device)
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
            step = step_to_come(config, state, run.replayed, micro_batch.size, clock.steps_behind)
            run.instruments.on_begin(run, step)
            fetched = batches.batch(state.position, step.tokens // config.data.sequence_length)
            batch, scored = fetched.batch, fetched.scored
            sums, norm = gradients.find(batch, scored, partial(checkpoint.set_random_state, model, random_state))
            if state.step == 0 and scored:
                check_first_gradients(config, model)
                check_first_loss(config, sums["loss"], scored)

            # Update. A signal that arrives now is handled after the step is recorded.
            lr = set_progress(optimizer, config.optimizer, config.schedule, step.progress)
            with run.interrupts.shielded():
                skipped = update(optimizer, norm)
                optimizer.zero_grad(set_to_none=True)
                state.advance(batch, clock.lap(), step.progress)
                if run.ema is not None:
                    run.ema.update(state.step, skipped)
                run.trace.append(step)
                random_state = checkpoint.random_state(model)

                # Measure and report.
                window.add_step(sums, skipped, scored, batch.inputs.numel(), fetched.scored_tokens)
                run.tracker.progress(state.step, state.progress, window.shown_loss, window.speed)
                if state.step % config.log_every == 0 or state.finished:
                    state.training = window.metrics(state.seconds, lr, norm) | state.loss_scale.metrics()
                    run.tracker.report(state.step, {**state.totals(), **state.training})
                run.tracker.messages(monitor.warnings(state))
    except Stop:
        save_stopped(run, random_state)
        return False


def peak_of(run: Run) -> float:
    """The peak FLOP/s of the device in the precision that it is fastest in."""
    return run.instruments.peak_flops(run.parts.device, {"float32", "bfloat16", run.config.precision.activations})


def what_is_due(run: Run) -> Overhead | None:
    """What to do before the next step, each at its own interval, and at the end everything; None if nothing is due."""
    config, state = run.config, run.state

    def on_cadence(every: int | None, at_start: bool = False) -> bool:
        return state.finished or (at_start if state.step == 0 else bool(every) and state.step % every == 0)

    is_best = config.checkpoint.keep_best and state.evaluated_at == state.step == (best(state.losses) or (None,))[0]
    if on_cadence(config.evaluation.every, config.evaluation.at_start) and state.evaluated_at != state.step:
        return "evaluation"
    if on_cadence(config.samples.every) and state.sampled_at != state.step:
        return "samples"
    if (is_best or on_cadence(config.checkpoint.every)) and not run.saved:
        # Weights that give no finite loss may be broken: the next good step shows whether they are.
        return "checkpoint" if state.finished or not state.failed else None
    return None


def do_what_is_due(run: Run, due: Overhead) -> None:
    """Evaluate, sample or save."""
    config, state = run.config, run.state
    used = used_parts(run)
    if due == "evaluation":
        with run.timed("evaluation"):
            with as_deployed(config, used.model):
                metrics = run.evaluator.metrics(used.model)
            if config.ema.evaluate_raw and used is not run.parts:
                with as_deployed(config, run.parts.model):
                    raw = run.evaluator.metrics(run.parts.model)
                metrics |= {name.replace("/", "_raw/"): metric for name, metric in raw.items()}
            metrics |= float_metrics(config, used)
        with run.interrupts.shielded():  # what is counted as done is recorded
            state.validation = metrics
            state.losses.append((state.step, metrics["val/loss"]))
            run.tracker.report(state.step, {**state.totals(), **metrics})
        if state.failed and not math.isfinite(metrics["val/loss"]):
            raise Diverged("the loss is", state.step - state.failed + 1)
        state.stopped_early = not state.finished and out_of_patience(
            state.losses, config.early_stopping.patience, config.early_stopping.min_delta
        )
    elif due == "samples":
        with run.timed("samples"), as_deployed(config, used.model):
            texts = sample(config, used)
        with run.interrupts.shielded():
            for prompt, text in zip(config.samples.prompts, texts, strict=True):
                run.tracker.sample(state.step, prompt, text)
            state.sampled_at = state.step
    else:
        save(run, checkpoint.random_state(run.parts.model))


def used_parts(run: Run) -> Parts:
    """The run's parts with the model that is evaluated and used later: the EMA, if there is one."""
    return run.parts if run.ema is None else replace(run.parts, model=run.ema.model)


def save(run: Run, random_state: Mapping[str, Tensor]) -> None:
    """Save the run as it is after its newest step, unless it is already saved. Raises Diverged for weights that are
    not finite: what is saved is good."""
    with run.interrupts.shielded():
        if not run.saved:
            models = {id(model): model for model in (run.parts.model, used_parts(run).model)}.values()
            if any(not_finite(dict(model.named_parameters())) for model in models):
                raise Diverged("weights are", run.state.step)
            state, section, model = run.state, run.config.checkpoint, run.parts.model
            averaged = run.ema and run.ema.model
            evaluated = section.keep_best and state.evaluated_at == state.step
            state.recorded = run.tracker.recorded() | run.trace.recorded()
            with run.timed("checkpoint"):
                checkpoint.save(
                    run.folder.checkpoints,
                    state.step,
                    model,
                    run.optimizer,
                    state.stored(),
                    section.keep,
                    adapter=stored_adapter(run.config, averaged or model),
                    averaged=averaged,
                    random=random_state,
                    loss=state.validation["val/loss"] if evaluated else None,
                )


def save_stopped(run: Run, random_state: Mapping[str, Tensor]) -> None:
    """Save a run that a signal ended. The interrupted step has not changed the weights: it will be taken again.

    After steps that failed the weights may be broken, and would take the place of good ones: nothing is saved, and all
    steps since the newest checkpoint are taken again.
    """
    if not run.state.failed:
        save(run, random_state)


def choose(run: Run) -> MicroBatch:
    """The run's micro-batch: as configured, as remembered, or the largest that fits."""
    run.parts.model.train()
    random_state = checkpoint.random_state(run.parts.model)

    def trial(size: int) -> None:
        run.optimizer.zero_grad(set_to_none=True)
        batch = run.loader.batch(0, size)
        with as_deployed(run.config, run.parts.model):  # fake quantization takes memory, even if it starts later
            # Memory is scarcer once there are gradients to add to.
            for _ in range(1 if run.config.is_step(size) else 2):
                run.compilation.passes(batch)

    try:
        return choose_micro_batch(run.config, run.parts.device, run.folder.micro_batch, trial, run.tracker.message)
    finally:
        run.optimizer.zero_grad(set_to_none=True)
        checkpoint.set_random_state(run.parts.model, random_state)


def compile_now(run: Run, micro_batch: MicroBatch) -> None:
    """Compile the step and the update, unless no step is left."""
    if not run.state.finished:
        run.compilation.ahead(run.loader.batch(0, micro_batch.size))
