"""Answers to tests of grids: greedy, sampled, and by a vote over variants of the task."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pretune.core.batch import IGNORE
from pretune.data.formats.arc import Arc
from pretune.data.formats.grid_variants import Variant, variants
from pretune.data.formats.grids import Grid, GridTask, Pair
from pretune.data.formats.segments import Place
from pretune.run.config import RunConfig
from pretune.run.generator import TextGenerator, assemble_generator
from pretune.run.losses import token_scorer
from pretune.run.parts import Parts
from pretune.run.sections import ArcConfig
from pretune.tasks.evaluate.grid_rows import as_batch, examples
from pretune.tasks.evaluate.progress import watched

_UNLIKELY = 1e9
"""Nats."""


@dataclass(frozen=True)
class Question:
    """One test of a task."""

    task: GridTask
    """The pairs, and this test alone."""
    number: int
    """Which of the task's tests it is, from 1."""

    @property
    def wanted(self) -> Grid | None:
        return self.task.test[0].output


@dataclass(frozen=True)
class Vote:
    """A grid that was answered in some variants, changed back, and the sum of its log-probabilities there, in nats."""

    grid: Grid
    count: int
    log_probability: float


@dataclass(frozen=True)
class Answers:
    """All answers to a question. `grids` are None where a text is none."""

    text: str
    grid: Grid | None
    votes: list[Vote]
    """The most frequent first; of equally frequent ones, the more likely."""
    samples: list[Grid | None]
    tokens_right: int
    """Tokens of the right output, of `tokens`, that are the likeliest ones in their places; 0 of 0 if it is unknown."""
    tokens: int

    def to_json(self, wanted: Grid | None) -> dict[str, Any]:
        votes = [asdict(one) for one in self.votes]
        right = None if wanted is None else self.grid == wanted
        return {"text": self.text, "grid": self.grid, "right": right, "votes": votes, "samples": self.samples}


def ask(config: RunConfig, parts: Parts, questions: Sequence[Question], quiet: bool) -> list[Answers]:
    """The answers of `parts.model` to questions whose prompts leave room. `quiet`: without a progress bar."""
    section, place = config.evaluation.arc, Place(config.data.source, 0)
    assert section is not None
    greedy = section.model_copy(update={"temperature": 0.0})
    generator = assemble_generator(config, greedy, parts.model, parts.tokenizer, parts.device)
    formatter = arc_formatter(generator)
    asked = [(number, one) for number, it in enumerate(questions) for one in variants(it.task, section.votes)]
    shown = [variant.of_task(questions[number].task) for number, variant in asked]
    texts = _generate(config, generator, section, [formatter.ask(one, one.test[0]) for one in shown], quiet)
    grids = [formatter.text.read(text) for text in texts]
    likely = _log_probabilities(config, parts, shown, grids, formatter, place)
    samples = _samples(config, parts, questions, quiet)
    right = _tokens_right(config, parts, questions, formatter, place)
    found: list[Answers] = []
    for number in range(len(questions)):
        own = [at for at, (owner, _) in enumerate(asked) if owner == number]
        votes = count_votes([(asked[at][1], grids[at], likely[at]) for at in own])
        found.append(Answers(texts[own[0]], grids[own[0]], votes, samples[number], *right[number]))
    return found


def count_votes(answers: Sequence[tuple[Variant, Grid | None, float]]) -> list[Vote]:
    """The grids of answers, each changed back from its variant; the most frequent first, then the more likely."""
    likelihoods: dict[Grid, list[float]] = defaultdict(list)
    for variant, grid, log_probability in answers:
        if grid is not None:
            likelihoods[variant.undo(grid)].append(log_probability)
    votes = [Vote(grid, len(found), sum(found)) for grid, found in likelihoods.items()]
    return sorted(votes, key=lambda vote: (-vote.count, -vote.log_probability))


def fitting(config: RunConfig, parts: Parts, questions: Sequence[Question]) -> list[Question]:
    """The questions whose prompts leave the model room for an answer."""
    assert config.evaluation.arc is not None
    generator = assemble_generator(config, config.evaluation.arc, parts.model, parts.tokenizer, parts.device)
    formatter, limit = arc_formatter(generator), generator.decoder.limit
    return [one for one in questions if len(generator.ids(formatter.ask(one.task, one.task.test[0]))) < limit]


def arc_formatter(generator: TextGenerator) -> Arc:
    """The formatter of the run's data, which a rule makes one for tasks of grids."""
    assert isinstance(generator.formatter, Arc)
    return generator.formatter


def _generate(
    config: RunConfig, generator: TextGenerator, section: ArcConfig, prompts: Sequence[Any], quiet: bool
) -> list[str]:
    """A text after each prompt; an empty one after a prompt that, as a variant's, has become too long."""
    ids = [generator.ids(prompt) for prompt in prompts]
    fits = [at for at, one in enumerate(ids) if len(one) < generator.decoder.limit]
    found = [""] * len(ids)
    with generator.autocast():
        written = generator.generate([ids[at] for at in fits], section.batch_size)
        for at, text in written if quiet else watched(config.task, written, len(fits), "answering tasks"):
            found[fits[at]] = text.text
    return found


def _samples(config: RunConfig, parts: Parts, questions: Sequence[Question], quiet: bool) -> list[list[Grid | None]]:
    section = config.evaluation.arc
    assert section is not None
    if not section.samples:
        return [[] for _ in questions]
    generator = assemble_generator(config, section, parts.model, parts.tokenizer, parts.device)
    formatter, count = arc_formatter(generator), section.samples
    prompts = [formatter.ask(one.task, one.task.test[0]) for one in questions for _ in range(count)]
    grids = [formatter.text.read(text) for text in _generate(config, generator, section, prompts, quiet)]
    return [grids[begin : begin + count] for begin in range(0, len(grids), count)]


def _log_probabilities(
    config: RunConfig,
    parts: Parts,
    tasks: Sequence[GridTask],
    grids: Sequence[Grid | None],
    formatter: Arc,
    place: Place,
) -> list[float]:
    """The log-probability in nats of each answered grid as training would write it; of what is none, 0."""
    found = [0.0] * len(tasks)
    some = [at for at, grid in enumerate(grids) if grid is not None]
    answered = [GridTask(tasks[at].name, tasks[at].train, (Pair(tasks[at].test[0].input, grids[at]),)) for at in some]
    for at, (nll, _, _) in zip(some, _scored(config, parts, answered, formatter, place), strict=True):
        found[at] = -nll
    return found


def _tokens_right(
    config: RunConfig, parts: Parts, questions: Sequence[Question], formatter: Arc, place: Place
) -> list[tuple[int, int]]:
    known = [at for at, one in enumerate(questions) if one.wanted is not None]
    found = [(0, 0)] * len(questions)
    scored = _scored(config, parts, [questions[at].task for at in known], formatter, place)
    for at, (_, right, tokens) in zip(known, scored, strict=True):
        found[at] = right, tokens
    return found


def _scored(
    config: RunConfig, parts: Parts, tasks: Sequence[GridTask], formatter: Arc, place: Place
) -> Iterator[tuple[float, int, int]]:
    """The negative log-likelihood of each task's output in nats, how many of its tokens are the likeliest, and how many
    there are; of what is longer than the model's positions, a large number and nothing."""
    assert config.evaluation.arc is not None
    score, size = token_scorer(config, parts), config.evaluation.arc.batch_size
    rows, limit = examples(tasks, formatter, parts.tokenizer, place), config.model.max_sequence_length
    found = [(_UNLIKELY, 0, 0)] * len(rows)
    order = sorted(
        (at for at, row in enumerate(rows) if len(row.tokens) <= limit), key=lambda at: -len(rows[at].tokens)
    )
    for begin in range(0, len(order), size):
        places = order[begin : begin + size]
        batch = as_batch([rows[at] for at in places])
        scores, counts = score(parts.model, batch), (batch.targets != IGNORE).sum(1).tolist()
        nll, right = scores.nll.cpu().to(torch.float64).sum(1).tolist(), scores.correct.sum(1).tolist()
        for at, *values in zip(places, nll, right, counts, strict=True):
            found[at] = (values[0], values[1], values[2])
    return iter(found)
