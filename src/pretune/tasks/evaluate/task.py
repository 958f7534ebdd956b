"""task=evaluate: measure a model on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pretune.checkpoint import store as checkpoint
from pretune.core.batch import IGNORE, Batch
from pretune.core.files import write_json
from pretune.data.formats.build import build_formatter
from pretune.data.formats.documents import problems
from pretune.data.formats.problems import Problem
from pretune.data.loader import Loader
from pretune.data.tokenizer import Tokenizer
from pretune.objectives.language_modeling import TokenScores, token_metrics
from pretune.objectives.objective import objective_of
from pretune.quantization.config import FakeQuantizationConfig
from pretune.run.assembly import assemble_evaluation
from pretune.run.config import RunConfig
from pretune.run.losses import scorer, token_scorer
from pretune.run.parts import Parts
from pretune.run.precision import resolved_config
from pretune.run.reference_model import with_reference
from pretune.run.weights import evaluated_run
from pretune.tasks.evaluate.answers import answer_metrics
from pretune.tasks.evaluate.progress import watched
from pretune.tracker.metrics import metric

Scorer = Callable[[Batch], TokenScores]
"""Scores every position of a batch, on its own device and in its own precision."""


def evaluate_run(config: RunConfig) -> int:
    """task=evaluate: measure a checkpoint (checkpoint.use) of the run that `config` names, and print the metrics."""
    folder = evaluated_run(config)
    config = resolved_config(config, folder)
    parts = with_reference(config, assemble_evaluation(config, folder))
    assert folder.checkpoint is not None
    step = checkpoint.step_of(folder.checkpoint)
    metrics = evaluate(config, parts)
    kind = config.quantization.kind
    write_json(folder.path / "evaluation.json", {"step": step, "quantization": kind, **metrics})
    rounded = f", quantization={kind}" if isinstance(config.quantization, FakeQuantizationConfig) else ""
    table = Table("metric", "value", title=f"{folder.name} at step {step:,}{rounded}")
    for name, value in metrics.items():
        table.add_row(name, metric(name).text(value))
    Console().print(table)
    print(f"written to {folder.path / 'evaluation.json'}")
    if config.evaluation.answers.measure:
        print(f"generated answers: {folder.path / 'evaluations' / 'answers.jsonl'}")
    return 0


def evaluate(config: RunConfig, parts: Parts) -> dict[str, float]:
    """All configured metrics over the whole validation set, and the loss over the held-out rows of each mixed-in set:
    `val_NAME/loss`."""
    micro_batch, token_bytes = config.evaluation.micro_batch, torch.from_numpy(parts.tokenizer.token_bytes())
    objective, score = objective_of(config.stage.objective), scorer(config, parts)
    metrics = objective.metrics(score, _validation_batches(config, parts), token_bytes)
    for name, part in parts.data.parts.items():
        batches = Loader(part.validation, config.data.part(name), config.seed).batches(micro_batch)
        found = objective.metrics(score, batches, token_bytes)
        metrics |= {f"val_{name}/{last}": found[f"val/{last}"] for last in ("loss", "bits_per_byte")}
    if config.evaluation.option_accuracy:
        formatter = build_formatter(config.data.format, parts.tokenizer.template_tokens)
        held_out = list(islice(problems(config.data, formatter), config.evaluation.max_problems))
        length = config.model.max_sequence_length
        compared = watched(config.task, held_out, "comparing options", len(held_out))
        metrics |= option_accuracy(
            token_scorer(config, parts), compared, parts.tokenizer, config.evaluation.micro_batch, length
        )
    if config.evaluation.answers.measure:
        metrics |= answer_metrics(config, parts)
    return metrics


def validation_loss(config: RunConfig, parts: Parts) -> float:
    """The loss over the validation set, in nats per scored token, whatever the run's objective."""
    token_bytes = torch.from_numpy(parts.tokenizer.token_bytes())
    return token_metrics(token_scorer(config, parts), _validation_batches(config, parts), token_bytes)["val/loss"]


def _validation_batches(config: RunConfig, parts: Parts) -> Iterable[Batch]:
    loader, size = Loader(parts.data.validation, config.data, config.seed), config.evaluation.micro_batch
    return watched(config.task, loader.batches(size), "reading the validation set", -(-loader.num_sequences // size))


def option_accuracy(
    score: Scorer, problems: Iterable[Problem], tokenizer: Tokenizer, micro_batch: int, max_length: int
) -> dict[str, float]:
    """The share of problems whose right option is the most likely continuation of the prompt, including its ending.

    `accuracy` compares summed log-likelihoods, `accuracy_normalized` divides them by the number of tokens; `chance` is
    the accuracy of guessing. The ending (EOS or what follows in training) counts, because otherwise an option that is a
    prefix of another ("1", "12") would always win. Problems longer than `max_length` tokens are left out and counted as
    `skipped`.
    """
    right = right_normalized = total = skipped = 0
    chance = 0.0
    for group in _grouped(problems, max(1, micro_batch // 5)):
        rows, owners = [], []
        for problem in group:
            prompt = tokenizer.encode(problem.prompt)
            end = [tokenizer.eos_id] if problem.closing is None else tokenizer.encode(problem.closing)
            options = [[*tokenizer.encode(option), *end] for option in problem.options]
            if len(prompt) + max(map(len, options)) > max_length:
                skipped += 1
                continue
            rows += [(prompt, option) for option in options]
            owners.append(problem)
        if not owners:
            continue
        likelihoods = _log_likelihoods(score, rows)
        at = 0
        for problem in owners:
            span = slice(at, at + len(problem.options))
            at = span.stop
            sums = likelihoods[span]
            means = sums / torch.tensor([len(option) for _, option in rows[span]])
            right += int(sums.argmax()) == problem.correct
            right_normalized += int(means.argmax()) == problem.correct
            chance += 1 / len(problem.options)
            total += 1
    if total == 0:
        return {}
    accuracy = right / total
    return {
        "mathqa/accuracy": accuracy,
        "mathqa/accuracy_error": math.sqrt(accuracy * (1 - accuracy) / total),
        "mathqa/accuracy_normalized": right_normalized / total,
        "mathqa/chance": chance / total,
        "mathqa/problems": total,
        "mathqa/skipped": skipped,
    }


def _log_likelihoods(score: Scorer, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """Log-probability in nats of each continuation given its prompt: [len(rows)]."""
    # With causal attention, padding on the right does not affect the tokens before it. Widths are rounded up, so that
    # there are only a few shapes.
    width = -(-max(len(prompt) + len(option) for prompt, option in rows) // 64) * 64
    inputs = torch.zeros(len(rows), width, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORE)
    for row, (prompt, option) in enumerate(rows):
        tokens = torch.tensor(prompt + option)
        inputs[row, : len(tokens)] = tokens
        targets[row, len(prompt) - 1 : len(tokens) - 1] = tokens[len(prompt) :]
    return -score(Batch(inputs, targets, None)).nll.cpu().double().sum(dim=1)


def _grouped(problems: Iterable[Problem], size: int) -> Iterator[list[Problem]]:
    iterator = iter(problems)
    while group := list(islice(iterator, size)):
        yield group
