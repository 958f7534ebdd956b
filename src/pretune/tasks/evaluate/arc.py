"""Tasks of grids, answered and compared cell by cell, before and after training on each task's own pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from pretune.core.files import write_atomic
from pretune.core.terminal import say
from pretune.data.formats.arc import Arc
from pretune.data.formats.build import build_formatter
from pretune.data.formats.grids import GridTask
from pretune.run.config import RunConfig
from pretune.run.parts import Parts
from pretune.run.weights import own_folder
from pretune.tasks.evaluate.grid_answers import Answers, Question, ask, fitting
from pretune.tasks.evaluate.progress import watched
from pretune.tasks.evaluate.train_each import Learner, steps_of

FILE = "arc.jsonl"
"""In the folder evaluations of a run: a line for each test."""


def arc_metrics(config: RunConfig, parts: Parts) -> dict[str, float]:
    """The shares of held-out tests whose output is found exactly; see `shares`.

    Tests without an output are answered, and not counted; those whose prompts leave no room are `left_out`. All answers
    are in evaluations/arc.jsonl.
    """
    assert config.evaluation.arc is not None
    assert parts.data.held_out is not None  # a rule asks for a format with tasks
    tasks = list(parts.data.held_out.tasks(config.evaluation.max_problems))
    asked = [
        Question(GridTask(task.name, task.train, (test,)), number)
        for task in tasks
        for number, test in enumerate(task.test, start=1)
    ]
    fits = fitting(config, parts, asked)
    records = [{"task": one.task.name, "test": one.number, "input": one.task.test[0].input, "wanted": one.wanted}
               for one in fits]  # fmt: skip
    unknown = sum(one.wanted is None for one in asked)
    if unknown and config.task == "evaluate":
        say(f"{unknown} of {len(asked)} tests have no output: they are answered, and not counted")
    group, found = config.data.format.group, ask(config, parts, fits, quiet=False)
    metrics = shares(group, fits, found)
    for record, answers, question in zip(records, found, fits, strict=True):
        record |= answers.to_json(question.wanted)
    if config.evaluation.arc.train_each.steps and fits:
        trained, steps = _after_training(config, parts, fits)
        metrics |= shares(f"{group}/trained", fits, trained) | {f"{group}/trained_steps": steps_of(steps)}
        for record, answers, question in zip(records, trained, fits, strict=True):
            record["trained"] = answers.to_json(question.wanted)
    lines = "".join(json.dumps(one) + "\n" for one in records)
    write_atomic(own_folder(config).path / "evaluations" / FILE, lines)
    if not metrics:
        return {}
    return {**metrics, f"{group}/tasks": len(tasks), f"{group}/left_out": len(asked) - len(fits)}


def shares(name: str, questions: Sequence[Question], found: Sequence[Answers]) -> dict[str, float]:
    """Shares of the questions with a known output, and standard errors, under the beginning of a name `GROUP` or
    `GROUP/trained`.

    `accuracy`: the greedy answer is right. `voted_accuracy`: that with the most votes is; `voted_pass_2`: one of the
    first two. `sampled_pass_1`, `sampled_pass_2`: one of that many samples is, in the mean over all draws of so many
    (arXiv 2107.03374). `token_accuracy`: of the tokens of the right outputs. `no_grid`: the greedy answer is none.
    """
    known = [(one.wanted, answers) for one, answers in zip(questions, found, strict=True) if one.wanted is not None]
    if not known:
        return {}
    before = f"{name}_" if "/" in name else f"{name}/"
    of: dict[str, Callable[[Any, Answers], float]] = {
        "accuracy": lambda wanted, given: given.grid == wanted,
        "voted_accuracy": lambda wanted, given: any(vote.grid == wanted for vote in given.votes[:1]),
        "voted_pass_2": lambda wanted, given: any(vote.grid == wanted for vote in given.votes[:2]),
    }
    for count in (1, 2):
        if all(len(answers.samples) >= count for _, answers in known):
            of[f"sampled_pass_{count}"] = lambda wanted, given, count=count: pass_at(
                len(given.samples), sum(grid == wanted for grid in given.samples), count
            )
    metrics: dict[str, float] = {}
    for last, value in of.items():
        values = [float(value(wanted, answers)) for wanted, answers in known]
        mean = sum(values) / len(values)
        spread = sum((one - mean) ** 2 for one in values) / len(values)
        metrics |= {f"{before}{last}": mean, f"{before}{last}_error": math.sqrt(spread / len(values))}
    tokens = sum(answers.tokens for _, answers in known)
    return {
        **metrics,
        f"{before}token_accuracy": sum(answers.tokens_right for _, answers in known) / max(tokens, 1),
        f"{before}no_grid": sum(answers.grid is None for _, answers in known) / len(known),
        f"{before}questions": len(known),
    }


def pass_at(samples: int, right: int, count: int) -> float:
    """The probability that one of `count` of the samples, drawn without putting back, is right."""
    return 1 - math.comb(samples - right, count) / math.comb(samples, count)


def _after_training(config: RunConfig, parts: Parts, questions: Sequence[Question]) -> tuple[list[Answers], list[int]]:
    """The answers after training on each task's own pairs, and the steps made on each."""
    assert config.evaluation.arc is not None
    formatter = build_formatter(config.data.format, parts.tokenizer.template_tokens)
    assert isinstance(formatter, Arc)
    learner = Learner(config, config.evaluation.arc.train_each, parts, formatter)
    of_tasks: dict[tuple[Any, ...], list[int]] = {}
    for at, one in enumerate(questions):
        of_tasks.setdefault((one.task.name, one.task.train), []).append(at)
    found: dict[int, Answers] = {}
    steps: list[int] = []
    for places in watched(config.task, of_tasks.values(), len(of_tasks), "training on each task"):
        own = [questions[at] for at in places]
        steps.append(learner.learn(own[0].task))
        found |= zip(places, ask(config, learner.parts, own, quiet=True), strict=True)
    return [found[at] for at in range(len(questions))], steps
