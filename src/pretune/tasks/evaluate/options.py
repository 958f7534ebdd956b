"""Multiple-choice accuracy by likelihood: which option is the most likely continuation of the prompt?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pretune.core.batch import IGNORE, Batch
from pretune.data.formats.problems import Problem
from pretune.data.formats.segments import Segment
from pretune.data.tokenizer import Tokenizer
from pretune.objectives.language_modeling import TokenScores
from pretune.tasks.evaluate.progress import watched

Scorer = Callable[[Batch], TokenScores]
"""Scores every position of a batch, on its own device and in its own precision."""

WIDTH = 64
"""Batches are as wide as a multiple of this, so that there are only a few shapes."""


class Continuation(NamedTuple):
    """A prompt and one of its options, as token ids."""

    prompt: list[int]
    option: list[int]
    end: list[int]
    """What follows the option in training: EOS, or the start of a rationale."""
    characters: int
    """Length of the option's text, without the space before it."""

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.option) + len(self.end)


@dataclass(frozen=True)
class Choice:
    """A problem as token ids: its options are rows `first` to `first + count`, and `correct` counts from `first`."""

    first: int
    count: int
    correct: int


@dataclass(frozen=True)
class Choices:
    """Tokenized problems. rows: those of all options. skipped: the number of problems that are too long."""

    choices: list[Choice]
    rows: list[Continuation]
    skipped: int


def tokenized(problems: Iterable[Problem], tokenizer: Tokenizer, max_length: int) -> Choices:
    """The problems as token ids. Those with an option that ends after `max_length` tokens are left out."""
    choices: list[Choice] = []
    rows: list[Continuation] = []
    skipped = 0
    for problem in problems:
        options = _continuations(problem, tokenizer)
        if max(option.length for option in options) > max_length:
            skipped += 1
            continue
        choices.append(Choice(len(rows), len(options), problem.correct))
        rows += options
    return Choices(choices, rows, skipped)


def _continuations(problem: Problem, tokenizer: Tokenizer) -> list[Continuation]:
    """The options, each tokenized as its document is in training: a segment after the prompt depends on no other."""
    count = len(problem.options)
    texts = [problem.prompt, *problem.options, *([problem.closing] if problem.closing is not None else [])]
    parts = tokenizer.encode_segments([Segment(text, True) for text in texts])
    prompt, rest = [*tokenizer.document_start(parts), *parts[0]], parts[1:]
    end = rest[count] if len(rest) > count else [tokenizer.eos_id]
    return [
        Continuation(prompt, ids, end, len(option.strip()))
        for ids, option in zip(rest[:count], problem.options, strict=True)
    ]


def batches(rows: Sequence[Continuation], tokens: int) -> Iterator[list[int]]:
    """Indices of the rows of each batch: rows of similar length, the longest first, at most `tokens` tokens together
    with their padding, but at least one row."""
    order = sorted(range(len(rows)), key=lambda row: -rows[row].length)
    while order:
        size = max(1, tokens // _width(rows[order[0]].length))
        yield order[:size]
        order = order[size:]


def option_accuracy(score: Scorer, given: Choices, tokens: int, task: str, group: str) -> dict[str, float]:
    """The share of problems whose right option is the most likely continuation of the prompt; empty without problems.

    `accuracy` compares the log-likelihoods of options with their ends, as they are trained: without an end, an option
    that begins another ("1", "12") would always win. `accuracy_per_token` divides them by their numbers of tokens.
    `lm_eval_acc` and `lm_eval_acc_norm` are acc and acc_norm of lm-evaluation-harness: log-likelihoods of the options
    alone, and divided by the characters of their texts. `chance` is the accuracy of guessing. Each comes with its
    standard error. `tokens`: of the largest batch. `task`: the one that the user runs. `group`: of
    the metrics.
    """
    if not given.choices:
        return {}
    sums = torch.zeros(len(given.rows), 2, dtype=torch.float64)
    places = list(batches(given.rows, tokens))
    for batch in watched(task, places, len(places), "comparing options"):
        sums[batch] = log_likelihoods(score, [given.rows[row] for row in batch])
    alone, ended = sums.unbind(1)
    found, total = {}, len(given.choices)
    for name, values in {
        "accuracy": ended,
        "accuracy_per_token": ended / torch.tensor([len(row.option) + len(row.end) for row in given.rows]),
        "lm_eval_acc": alone,
        "lm_eval_acc_norm": alone / torch.tensor([row.characters for row in given.rows]),
    }.items():
        share = _right(values, given.choices) / total
        found[f"{group}/{name}"] = share
        found[f"{group}/{name}_error"] = math.sqrt(share * (1 - share) / total)
    return {
        **found,
        f"{group}/chance": sum(1 / choice.count for choice in given.choices) / total,
        f"{group}/problems": total,
        f"{group}/skipped": given.skipped,
    }


def _right(values: Tensor, choices: Iterable[Choice]) -> int:
    """The number of problems whose right option has the largest value."""
    return sum(int(values[choice.first : choice.first + choice.count].argmax()) == choice.correct for choice in choices)


def log_likelihoods(score: Scorer, rows: Sequence[Continuation]) -> Tensor:
    """Log-probability in nats of each option given its prompt, alone and with its end: [len(rows), 2] float64."""
    # With causal attention, padding on the right does not affect the tokens before it.
    inputs = torch.zeros(len(rows), _width(max(row.length for row in rows)), dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORE)
    alone = torch.zeros_like(inputs, dtype=torch.bool)
    for number, row in enumerate(rows):
        tokens, begin = torch.tensor(row.prompt + row.option + row.end), len(row.prompt)
        inputs[number, : row.length] = tokens
        targets[number, begin - 1 : row.length - 1] = tokens[begin:]
        alone[number, begin - 1 : begin - 1 + len(row.option)] = True
    nll = score(Batch(inputs, targets, None)).nll.cpu().double()
    return -torch.stack([(nll * alone).sum(dim=1), nll.sum(dim=1)], dim=1)


def _width(length: int) -> int:
    return -(-length // WIDTH) * WIDTH
