"""What is due between two steps: evaluate, sample, save."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from pretune.checkpoint import store as checkpoint
from pretune.checkpoint.generators import generator_states
from pretune.core.named_tensors import not_finite
from pretune.optim.config import Overhead
from pretune.run.model import stored_adapter
from pretune.tasks.generate.task import sample
from pretune.tasks.train.qat import as_deployed, float_metrics
from pretune.tasks.train.running import Run, used_parts
from pretune.training.divergence import Diverged
from pretune.training.early_stopping import best, out_of_patience


def what_is_due(run: Run) -> Overhead | None:
    """What to do before the next step, each at its own interval, and at the end everything; None if nothing is due. Of
    several processes one decides: what is saved already shows at different times."""
    due: Overhead | None = _due(run) if run.processes.main else None
    return run.processes.decided(due)


def _due(run: Run) -> Overhead | None:
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
        with run.timed("evaluation"), run.whole():
            metrics = _measured(run)
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
        texts = []
        with run.whole():
            if run.processes.main:
                with run.timed("samples"), as_deployed(config, used.model):
                    texts = sample(config, used)
        with run.interrupts.shielded():
            for prompt, text in zip(config.samples.prompts, texts, strict=False):
                run.tracker.sample(state.step, prompt, text)
            state.sampled_at = state.step
    else:
        save(run, generator_states(run.parts.model))


def _measured(run: Run) -> dict[str, float]:
    """What an evaluation measures: of the model that is used later, and where the configuration says so of others."""
    config, used = run.config, used_parts(run)
    with as_deployed(config, used.model):
        metrics = run.evaluator.metrics(used.model)
    if config.ema.evaluate_raw and used is not run.parts:
        with as_deployed(config, run.parts.model):
            raw = run.evaluator.metrics(run.parts.model)
        metrics |= {name.replace("/", "_raw/"): metric for name, metric in raw.items()}
    return metrics | float_metrics(config, used)


def save(run: Run, random_state: Mapping[str, Tensor]) -> None:
    """Save the run as it is after its newest step, unless it is already saved. Raises Diverged for weights that are
    not finite: what is saved is good."""
    with run.interrupts.shielded():
        if not run.processes.decided(run.saved):
            models = {id(model): model for model in (run.parts.model, used_parts(run).model)}.values()
            if run.processes.any(any(not_finite(dict(model.named_parameters())) for model in models)):
                raise Diverged("weights are", run.state.step)
            state, section, model = run.state, run.config.checkpoint, run.parts.model
            averaged = run.ema and run.ema.model
            evaluated = section.keep_best and state.evaluated_at == state.step
            with run.timed("checkpoint"), run.processes.main_alone() as main:
                if main or run.training.sharded:  # then each writes its part
                    state.recorded = run.tracker.recorded() | run.trace.recorded()
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
