"""Multiple-choice accuracy by likelihood: which option is the most likely continuation of the prompt?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretune.core.batch import IGNORE, Batch
from pretune.data.formats.problems import Problem
from pretune.data.tokenizer import Tokenizer
from pretune.objectives.language_modeling import TokenScores
from pretune.tasks.evaluate.progress import watched

Scorer = Callable[[Batch], TokenScores]
"""Scores every position of a batch, on its own device and in its own precision."""

WIDTH = 64
"""Batches are as wide as a multiple of this, so that there are only a few shapes."""


@dataclass(frozen=True)
class Choice:
    """A problem as token ids: its options are rows `first` to `first + count`, and `correct` counts from `first`."""

    first: int
    count: int
    correct: int


@dataclass(frozen=True)
class Choices:
    """Tokenized problems. rows: token ids of a prompt, and those of one of its options. skipped: the number of problems
    that are too long."""

    choices: list[Choice]
    rows: list[tuple[list[int], list[int]]]
    skipped: int


def tokenized(problems: Iterable[Problem], tokenizer: Tokenizer, max_length: int) -> Choices:
    """The problems as token ids. Those with an option that ends after `max_length` tokens are left out.

    An option ends with EOS, or with what follows it in training: otherwise an option that is a prefix of another ("1",
    "12") would always win.
    """
    choices: list[Choice] = []
    rows: list[tuple[list[int], list[int]]] = []
    skipped = 0
    for problem in problems:
        prompt = tokenizer.encode(problem.prompt)
        end = [tokenizer.eos_id] if problem.closing is None else tokenizer.encode(problem.closing)
        options = [[*tokenizer.encode(option), *end] for option in problem.options]
        if len(prompt) + max(map(len, options)) > max_length:
            skipped += 1
            continue
        choices.append(Choice(len(rows), len(options), problem.correct))
        rows += [(prompt, option) for option in options]
    return Choices(choices, rows, skipped)


def batches(rows: Sequence[tuple[list[int], list[int]]], tokens: int) -> Iterator[list[int]]:
    """Indices of the rows of each batch: rows of similar length, the longest first, at most `tokens` tokens together
    with their padding, but at least one row."""
    order = sorted(range(len(rows)), key=lambda row: -_length(rows[row]))
    while order:
        size = max(1, tokens // _width(_length(rows[order[0]])))
        yield order[:size]
        order = order[size:]


def option_accuracy(score: Scorer, given: Choices, tokens: int, task: str) -> dict[str, float]:
    """The share of problems whose right option is the most likely continuation of the prompt; empty without problems.

    `accuracy` compares summed log-likelihoods, `accuracy_normalized` divides them by the number of tokens; `chance` is
    the accuracy of guessing. `tokens`: of the largest batch. `task`: the one that the user runs.
    """
    if not given.choices:
        return {}
    sums = torch.zeros(len(given.rows), dtype=torch.float64)
    places = list(batches(given.rows, tokens))
    for batch in watched(task, places, len(places), "comparing options"):
        sums[batch] = _log_likelihoods(score, [given.rows[row] for row in batch])
    means = sums / torch.tensor([len(option) for _, option in given.rows])
    total = len(given.choices)
    accuracy = _right(sums, given.choices) / total
    return {
        "mathqa/accuracy": accuracy,
        "mathqa/accuracy_error": math.sqrt(accuracy * (1 - accuracy) / total),
        "mathqa/accuracy_normalized": _right(means, given.choices) / total,
        "mathqa/chance": sum(1 / choice.count for choice in given.choices) / total,
        "mathqa/problems": total,
        "mathqa/skipped": given.skipped,
    }


def _right(values: Tensor, choices: Iterable[Choice]) -> int:
    """The number of problems whose right option has the largest value."""
    return sum(int(values[choice.first : choice.first + choice.count].argmax()) == choice.correct for choice in choices)


def _log_likelihoods(score: Scorer, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """Log-probability in nats of each continuation given its prompt: [len(rows)] float64."""
    # With causal attention, padding on the right does not affect the tokens before it.
    inputs = torch.zeros(len(rows), _width(max(map(_length, rows))), dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORE)
    for row, (prompt, option) in enumerate(rows):
        tokens = torch.tensor(prompt + option)
        inputs[row, : len(tokens)] = tokens
        targets[row, len(prompt) - 1 : len(tokens) - 1] = tokens[len(prompt) :]
    return -score(Batch(inputs, targets, None)).nll.cpu().double().sum(dim=1)


def _length(row: tuple[list[int], list[int]]) -> int:
    return len(row[0]) + len(row[1])


def _width(length: int) -> int:
    return -(-length // WIDTH) * WIDTH
