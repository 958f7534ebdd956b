"""Answers to tasks of grids: compared cell by cell, voted for, and given after training on each task alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretune.core.config import ConfigError, validate
from pretune.data.formats.arc import Arc
from pretune.data.formats.build import build_formatter
from pretune.data.formats.grid_variants import Variant
from pretune.data.formats.grids import GridTask, Pair
from pretune.dispatch import run
from pretune.run.assembly import assemble_evaluation
from pretune.run.config import RunConfig
from pretune.run.parts import Parts
from pretune.run.weights import evaluated_run
from pretune.tasks.evaluate.arc import arc_metrics, pass_at, shares
from pretune.tasks.evaluate.grid_answers import Answers, Question, Vote, ask, count_votes
from pretune.tasks.evaluate.train_each import Learner

Compose = Callable[..., dict[str, Any]]
SMALL = [
    "name=one", "data=grid_puzzles", "data/tokenizer=trained", "data.source.num_tasks=40", "data.source.max_size=3",
    "data.source.num_pairs=2", "data.validation.fraction=0.25", "model.vocab_size=512", "data.tokenizer.vocab_size=280",
    "data.sequence_length=128", "model.dim=32", "model.num_layers=1", "budget.steps=2", "precision=fp32",
    "precision.compile=false", "samples.prompts=[]", "evaluation=arc", "evaluation.max_problems=4",
    "evaluation.arc.max_new_tokens=12", "evaluation.arc.votes.variants=3", "evaluation.arc.samples=2",
]  # fmt: skip
TRAINED = ["task=evaluate", "evaluation.arc.train_each={steps: 3, seconds: 600, batch_size: 2, lr: 1e-2}"]


@pytest.fixture
def mapping(composed: Compose, tmp_path: Path) -> Compose:
    return lambda *more: composed("smoke", *SMALL, f"output_dir={tmp_path}", *more)


def assembled(mapping: dict[str, Any]) -> tuple[RunConfig, Parts]:
    config = validate(RunConfig, mapping)
    return config, assemble_evaluation(config, evaluated_run(config))


def lines(folder: Path) -> list[dict[str, Any]]:
    file = folder / "one" / "evaluations" / "arc.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def weights(parts: Parts) -> dict[str, Tensor]:
    return {name: one.clone() for name, one in parts.model.state_dict().items()}


def test_tasks_are_answered_in_training_and_after_with_and_without_training_on_each(
    mapping: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(mapping()) == 0
    rows = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "arc/accuracy" in row] == [0, 2]
    assert run(mapping(*TRAINED)) == 0
    found = json.loads((tmp_path / "one" / "evaluation.json").read_text())
    names = (
        "accuracy",
        "voted_accuracy",
        "voted_pass_2",
        "sampled_pass_1",
        "sampled_pass_2",
        "token_accuracy",
        "no_grid",
    )
    assert {f"arc/{before}{name}" for name in names for before in ("", "trained_")} <= found.keys()
    assert (found["arc/questions"], found["arc/tasks"], found["arc/trained_steps"]) == (4, 4, 3)
    assert found["arc/token_accuracy"] == [row for row in rows if "arc/accuracy" in row][-1]["arc/token_accuracy"]
    records = lines(tmp_path)
    assert len({record["task"] for record in records}) == 4
    for before, answers in (("", records), ("trained_", [record["trained"] for record in records])):
        assert found[f"arc/{before}no_grid"] == sum(one["grid"] is None for one in answers) / 4
        assert found[f"arc/{before}accuracy"] == sum(one["right"] for one in answers) / 4
        assert all(len(one["samples"]) == 2 for one in answers)
    (kept,) = (tmp_path / "one" / "evaluations").glob("step-*-arc.jsonl")
    assert kept.read_text() == (tmp_path / "one" / "evaluations" / "arc.jsonl").read_text()
    assert "arc/trained_accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("adapter", ["none", "lora", "dora"])
def test_the_model_is_the_same_bit_for_bit_and_tasks_do_not_help_each_other(adapter: str, mapping: Compose) -> None:
    base = mapping("checkpoint.keep_best=false")
    assert run(base) == 0
    changes = [*TRAINED, "stage=finetune", "stage.init_from=one", f"adapter={adapter}", "adapter.rank=2"]
    config, parts = assembled(mapping(*(changes[:-1] if adapter == "none" else changes)))
    before, section, held_out = weights(parts), config.evaluation.arc, parts.data.held_out
    assert section is not None
    assert held_out is not None
    formatter = build_formatter(config.data.format, parts.tokenizer.template_tokens)
    assert isinstance(formatter, Arc)
    learner = Learner(config, section.train_each, parts, formatter)
    first, second = list(held_out.tasks(2))
    found: list[dict[str, Tensor]] = []
    for task in (first, second, first):
        assert learner.learn(task) == 3
        found.append(weights(learner.parts))
    assert all(torch.equal(one, found[2][name]) for name, one in found[0].items())
    assert any(not torch.equal(one, found[1][name]) for name, one in found[0].items())
    adapted = {name for name, one in learner.parts.model.named_parameters() if one.requires_grad}
    assert all("lora_" in name for name in adapted) == (adapter != "none")
    arc_metrics(config, parts)
    after = weights(parts)
    assert before.keys() == after.keys()
    assert all(torch.equal(one, after[name]) for name, one in before.items())


def test_training_on_a_task_makes_its_pairs_likelier(mapping: Compose) -> None:
    assert run(mapping()) == 0
    config, parts = assembled(mapping("task=evaluate", "evaluation.arc.train_each={steps: 12, lr: 1e-2, seconds: 600}"))
    assert config.evaluation.arc is not None
    assert parts.data.held_out is not None
    formatter = build_formatter(config.data.format, parts.tokenizer.template_tokens)
    assert isinstance(formatter, Arc)
    learner = Learner(config, config.evaluation.arc.train_each, parts, formatter)
    task = next(parts.data.held_out.tasks(1))
    own = Question(GridTask(task.name, task.train[1:], task.train[:1]), 1)
    (before,) = ask(config, parts, [own], quiet=True)
    assert learner.learn(task) == 12
    (after,) = ask(config, learner.parts, [own], quiet=True)
    assert after.tokens == before.tokens > 0
    assert after.tokens_right > before.tokens_right
    # Without time there are no steps, and without a second pair there is nothing to learn from.
    assert learner.learn(GridTask(task.name, task.train[:1], task.test)) == 0
    hurried = config.evaluation.arc.train_each.model_copy(update={"seconds": 1e-9})
    assert Learner(config, hurried, parts, formatter).learn(task) == 0


def test_votes_have_the_likelihood_of_the_whole_answer(mapping: Compose) -> None:
    assert run(mapping()) == 0
    config, parts = assembled(mapping("task=evaluate", "evaluation.arc.votes.variants=1"))
    formatter = build_formatter(config.data.format, parts.tokenizer.template_tokens)
    assert isinstance(formatter, Arc)
    shown = GridTask("a", (Pair(((1,),), ((2,),)), Pair(((3,),), ((4,),))), (Pair(((5,),), ((6, 7), (8, 9))),))
    (answers,) = ask(config, parts, [Question(shown, 1)], quiet=True)
    text = parts.tokenizer.encode(formatter.ask(shown, shown.test[0])[0].text)
    output = [*parts.tokenizer.encode("67\n89"), parts.tokenizer.eos_id]
    with torch.no_grad():
        logits = parts.model.eval().unembed(parts.model(torch.tensor([text + output])))[0, len(text) - 1 : -1]
    assert answers.tokens == len(output)
    assert answers.tokens_right == sum(int(row.argmax()) == token for row, token in zip(logits, output, strict=True))
    if answers.grid is not None:
        given = [*parts.tokenizer.encode(formatter.text.write(answers.grid)), parts.tokenizer.eos_id]
        with torch.no_grad():
            logits = parts.model.unembed(parts.model(torch.tensor([text + given])))[0, len(text) - 1 : -1].double()
        likely = sum(row.log_softmax(-1)[token].item() for row, token in zip(logits, given, strict=True))
        assert answers.votes[0].log_probability == pytest.approx(likely, rel=1e-4)


AS_IT_IS = Variant(0, False, tuple(range(10)), (0,))
TURNED = replace(AS_IT_IS, turns=1)
RECOLORED = replace(AS_IT_IS, colors=(0, 2, 1, *range(3, 10)))


def test_a_vote_is_taken_after_each_variant_is_undone() -> None:
    one, other = ((1, 2),), ((2, 2),)
    given = [
        (AS_IT_IS, other, -1.0),
        (TURNED, TURNED.apply(one), -2.0),
        (RECOLORED, ((2, 1),), -3.0),
        (TURNED, None, 0.0),
    ]
    assert count_votes(given) == [Vote(one, 2, -5.0), Vote(other, 1, -1.0)]
    # Of equally frequent ones, the more likely is the answer, whichever came first.
    assert [vote.grid for vote in count_votes(given[:2])] == [other, one]
    assert [vote.grid for vote in count_votes([given[1], (AS_IT_IS, other, -9.0)])] == [one, other]
    assert count_votes([(TURNED, None, 0.0)]) == []


@pytest.mark.parametrize(("samples", "right", "count"), [(5, 2, 1), (5, 2, 2), (4, 0, 2), (3, 3, 2), (2, 1, 2)])
def test_pass_at_is_the_share_of_all_draws(samples: int, right: int, count: int) -> None:
    draws = list(itertools.combinations([True] * right + [False] * (samples - right), count))
    assert pass_at(samples, right, count) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_right_wrong_and_missing_answers_are_counted() -> None:
    wanted, wrong = ((1,),), ((2,),)

    def question(output: Any) -> Question:
        return Question(GridTask("a", (), (Pair(((0,),), output),)), 1)

    found = [
        Answers("1", wanted, [Vote(wrong, 2, 0.0), Vote(wanted, 1, 0.0)], [wanted, wrong], 2, 2),
        Answers("?", None, [Vote(wanted, 1, 0.0)], [None, None], 0, 2),
        Answers("2", wrong, [], [wrong, wrong], 1, 4),
        Answers("1", wanted, [], [wanted, wanted], 0, 0),
    ]
    figures = shares("arc", [question(wanted), question(wanted), question(wanted), question(None)], found)
    assert {name: value for name, value in figures.items() if "error" not in name} == {
        "arc/accuracy": pytest.approx(1 / 3), "arc/voted_accuracy": pytest.approx(1 / 3),
        "arc/voted_pass_2": pytest.approx(2 / 3), "arc/sampled_pass_1": pytest.approx(1 / 6),
        "arc/sampled_pass_2": pytest.approx(1 / 3), "arc/token_accuracy": 3 / 8, "arc/no_grid": pytest.approx(1 / 3),
        "arc/questions": 3,
    }  # fmt: skip
    assert figures["arc/accuracy_error"] == pytest.approx((1 / 3 * 2 / 3 / 3) ** 0.5)
    assert shares("arc", [question(None)], found[:1]) == {}


def test_tests_without_an_output_are_answered_and_said(
    composed: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def task(number: int) -> dict[str, Any]:
        pair = {"input": [[number % 10, number // 10]], "output": [[1]]}
        tests = [{"input": [[number % 10]], "output": [[2]]}, {"input": [[3]]}]
        return {"train": [pair, pair], "test": tests}

    (tmp_path / "tasks.json").write_text(json.dumps({f"t{number}": task(number) for number in range(30)}))
    changes = ["data=arc", f"data.source.files=[{tmp_path}/tasks.json]"]
    keys = [one for one in SMALL if not one.startswith(("data=", "data.source"))]
    own = [*keys[:1], *changes, *keys[1:]]
    full = composed("smoke", *own, f"output_dir={tmp_path}")
    assert run(full) == 0
    capsys.readouterr()
    assert run(full | {"task": "evaluate"}) == 0
    assert "4 of 8 tests have no output: they are answered, and not counted" in capsys.readouterr().out
    records = lines(tmp_path)
    assert [record["right"] is None for record in records] == [False, True] * 4
    assert json.loads((tmp_path / "one" / "evaluation.json").read_text())["arc/questions"] == 4


def test_what_cannot_be_measured_is_refused(mapping: Compose, composed: Compose) -> None:
    with pytest.raises(ConfigError, match=r"needs data\.format\.kind = arc, not text"):
        validate(RunConfig, composed("smoke", "evaluation=arc"))
    with pytest.raises(ConfigError, match="set it only for task=evaluate"):
        validate(RunConfig, mapping("evaluation.arc.train_each.steps=1"))
    with pytest.raises(ConfigError, match="are all the same"):
        validate(RunConfig, mapping("evaluation.arc.temperature=0"))
