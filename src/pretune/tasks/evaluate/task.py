"""task=evaluate: measure a model on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pretune.checkpoint import store as checkpoint
from pretune.core.batch import Batch
from pretune.core.files import fingerprint, write_atomic, write_json
from pretune.core.terminal import say
from pretune.data.loader import Loader
from pretune.model.build import Model
from pretune.objectives.language_modeling import token_metrics
from pretune.objectives.objective import objective_of
from pretune.parallel.processes import ALONE, Processes
from pretune.parallel.scores import SharedScores
from pretune.quantization.config import FakeQuantizationConfig
from pretune.run.assembly import assemble_evaluation
from pretune.run.config import RunConfig
from pretune.run.folder import RunFolder
from pretune.run.frozen_models import with_frozen
from pretune.run.losses import scorer, token_scorer
from pretune.run.parts import Parts
from pretune.run.precision import resolved_config
from pretune.run.weights import evaluated_run
from pretune.tasks.evaluate.answers import FILE as ANSWERS
from pretune.tasks.evaluate.answers import answer_metrics
from pretune.tasks.evaluate.arc import FILE as GRIDS
from pretune.tasks.evaluate.arc import arc_metrics
from pretune.tasks.evaluate.options import Choices, option_accuracy, tokenized
from pretune.tasks.evaluate.progress import watched
from pretune.tasks.evaluate.retrieval import retrieval_metrics
from pretune.tracker.metrics import metric


def evaluate_run(config: RunConfig) -> int:
    """task=evaluate: measure a checkpoint (checkpoint.use) of the run that `config` names, and print the metrics."""
    folder = evaluated_run(config)
    config = resolved_config(config, folder)
    parts = with_frozen(config, assemble_evaluation(config, folder), validation_only=True)
    assert folder.checkpoint is not None
    step = checkpoint.step_of(folder.checkpoint)
    trained_on = checkpoint.state_of(folder.checkpoint).get("data", {}).get("train")
    if trained_on not in (None, parts.data.train.fingerprint):
        say(f"{folder.name} was trained on other documents than now: those that are held out now may be among them")
    metrics = Evaluator(config, parts).metrics(parts.model)
    kind = config.quantization.kind
    kept = _keep(config, folder, {"step": step, "quantization": kind, **metrics})
    rounded = f", quantization={kind}" if isinstance(config.quantization, FakeQuantizationConfig) else ""
    table = Table("metric", "value", title=f"{folder.name} at step {step:,}{rounded}")
    for name, value in metrics.items():
        table.add_row(name, metric(name).text(value))
    Console().print(table)
    say(f"written to {folder.path / 'evaluation.json'} and, to stay, {kept}")
    for file in _written(config):
        say(f"answers: {folder.path / 'evaluations' / file}")
    return 0


def _written(config: RunConfig) -> list[str]:
    """The files that an evaluation leaves in evaluations/ beside its metrics."""
    retrieval = config.evaluation.retrieval
    made = {ANSWERS: config.evaluation.answers.measure, GRIDS: config.evaluation.arc is not None}
    found = [file for file, is_made in made.items() if is_made]
    return [*found, *([] if retrieval is None else [f"{retrieval.source.task}{end}" for end in (".json", ".png")])]


def _keep(config: RunConfig, run: RunFolder, result: dict[str, Any]) -> Path:
    """Write a result as the newest one, and where only the same evaluation of the same checkpoint writes again; return
    the latter. Beside it is what else was written, if there is anything."""
    sections = config.model, config.evaluation, config.data, config.precision
    settings = [section.model_dump() for section in sections]
    rounding = "" if result["quantization"] == "none" else f"-{result['quantization']}"
    folder, name = run.path / "evaluations", f"step-{result['step']}{rounding}-{fingerprint(settings)[:8]}"
    write_json(folder / f"{name}.json", result)
    for file in _written(config):
        write_atomic(folder / f"{name}-{file}", (folder / file).read_bytes())
    write_json(run.path / "evaluation.json", result)
    return folder / f"{name}.json"


class Evaluator:
    """Measures models of a run on its held-out data. What stays the same between evaluations is prepared once.

    `parts`: those of the run; its model is not used. `compiled`: compile the scores of the validation set, which pays
    if it is measured many times. `say` is told once that they are being compiled. `processes`: those that share the
    validation set out among themselves.
    """

    def __init__(
        self,
        config: RunConfig,
        parts: Parts,
        compiled: bool = False,
        say: Callable[[str], None] = say,
        processes: Processes = ALONE,
    ) -> None:
        self._config, self._parts, self._processes = config, parts, processes
        self._say = say if compiled else None
        self._score = scorer(config, parts, compiled)
        self._token_bytes = torch.from_numpy(parts.tokenizer.token_bytes())

    def metrics(self, model: Model) -> dict[str, float]:
        """All configured metrics over the whole validation set, and the loss over the held-out rows of each mixed-in
        set: `val_NAME/loss`."""
        if self._say is not None:
            self._say("compiling the evaluation (once; precision.compile=false skips it) ...")
            self._say = None
        config, parts, score = self._config, replace(self._parts, model=model), partial(self._score, model)
        objective, micro_batch = objective_of(config.stage.objective), config.evaluation.micro_batch
        shared = SharedScores(score, _validation_batches(config, parts), self._processes)
        metrics = objective.metrics(shared, shared, self._token_bytes)
        for name, part in parts.data.parts.items():
            held_out = Loader(part.validation, config.data.part(name), config.seed).batches(micro_batch)
            shared = SharedScores(score, held_out, self._processes)
            found = objective.metrics(shared, shared, self._token_bytes)
            metrics |= {f"val_{name}/{last}": found[f"val/{last}"] for last in ("loss", "bits_per_byte")}
        if config.evaluation.option_accuracy:
            tokens = micro_batch * config.data.sequence_length
            token_score = partial(token_scorer(config, parts), model)
            group = config.data.format.group
            metrics |= option_accuracy(token_score, self._choices, tokens, config.task, group)
        if config.evaluation.answers.measure:
            metrics |= answer_metrics(config, parts)
        if config.evaluation.retrieval is not None:
            metrics |= retrieval_metrics(config, parts)
        if config.evaluation.arc is not None:
            metrics |= arc_metrics(config, parts)
        return metrics

    @cached_property
    def _choices(self) -> Choices:
        config, held_out = self._config, self._parts.data.held_out
        assert held_out is not None  # a rule asks for a format with options
        found = held_out.problems(config.evaluation.max_problems)
        return tokenized(found, self._parts.tokenizer, config.model.max_sequence_length)


def validation_loss(config: RunConfig, parts: Parts) -> float:
    """The loss over the validation set, in nats per scored token, whatever the run's objective."""
    score, token_bytes = partial(token_scorer(config, parts), parts.model), parts.tokenizer.token_bytes()
    return token_metrics(score, _validation_batches(config, parts), torch.from_numpy(token_bytes))["val/loss"]


def _validation_batches(config: RunConfig, parts: Parts) -> Iterable[Batch]:
    loader, size = Loader(parts.data.validation, config.data, config.seed), config.evaluation.micro_batch
    return watched(config.task, loader.batches(size), -(-loader.num_sequences // size), "reading the validation set")
