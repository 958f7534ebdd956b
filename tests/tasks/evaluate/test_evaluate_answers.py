"""Generated answers: prompted as in training, on held-out problems, counted correctly with any batch size."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from pretune.core.config import ConfigError, validate
from pretune.data.formats.build import build_formatter
from pretune.data.formats.documents import questions
from pretune.data.formats.mathqa import parse_options
from pretune.data.formats.special_tokens import TemplateTokens
from pretune.data.sources.rows import validation_rows
from pretune.dispatch import run
from pretune.generation.texts import Text
from pretune.run.config import RunConfig
from pretune.tasks.evaluate.answers import record, shares

Compose = Callable[..., dict[str, Any]]
SMALL = [
    "name=one", "data=word_problems", "data/tokenizer=trained", "data.source.num_problems=60",
    "data.validation.fraction=0.3", "model.vocab_size=512", "data.tokenizer.vocab_size=400", "budget.steps=2",
    "precision=fp32", "precision.compile=false", "samples.prompts=[]", "evaluation.answers.max_new_tokens=8",
]  # fmt: skip


@pytest.fixture
def measured(composed: Compose, tmp_path: Path) -> Compose:
    """`measured(*overrides)`: evaluates a run of two steps on word problems."""
    overrides = [*SMALL, f"output_dir={tmp_path}"]
    assert run(composed("smoke", *overrides)) == 0
    return lambda *more: composed("smoke", *overrides, "task=evaluate", "evaluation.answers.measure=true", *more)


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "one" / "evaluations" / "answers.jsonl").read_text().splitlines()]


def figures(folder: Path) -> dict[str, float]:
    return json.loads((folder / "one" / "evaluation.json").read_text())


def test_the_batch_changes_nothing(measured: Compose, tmp_path: Path) -> None:
    found = []
    for batch in (1, 4, 100):
        assert run(measured(f"evaluation.answers.batch_size={batch}")) == 0
        found.append((figures(tmp_path), answers(tmp_path)))
    assert found[0] == found[1] == found[2]
    assert len(found[0][1]) == found[0][0]["mathqa/questions"] > 5


def test_every_held_out_problem_is_asked_as_in_training(measured: Compose, tmp_path: Path) -> None:
    mapping = measured("data.format.rationale=before")
    assert run(mapping) == 0
    held_out = list(validation_rows(validate(RunConfig, mapping).data))
    records = answers(tmp_path)
    assert len(records) == len(held_out)
    for answer, row in zip(records, held_out, strict=True):
        assert answer["prompt"].startswith(row["Problem"])
        assert answer["wanted"] == parse_options(row["options"])[row["correct"]]


def test_right_wrong_and_missing_answers_are_counted(composed: Compose) -> None:
    config = validate(RunConfig, composed("smoke", *SMALL, "data.format.options=false"))
    rows = list(validation_rows(config.data))[:8]
    formatter = build_formatter(config.data.format, TemplateTokens(None, "", "<|endoftext|>", ()))
    asked = list(islice(questions(config.data, formatter), 8))
    right = [f" {parse_options(row['options'])[row['correct']]}" for row in rows]
    wrong = [
        f" {next(text for key, text in parse_options(row['options']).items() if key != row['correct'])}" for row in rows
    ]
    said = [*right[:5], *wrong[5:7], " who knows"]
    records = [record(question, Text(text, 3, "end")) for question, text in zip(asked, said, strict=True)]
    assert [one["right"] for one in records] == [True] * 5 + [False] * 3
    assert shares("mathqa", "generated_accuracy", records) == {
        "mathqa/generated_accuracy": 5 / 8,
        "mathqa/generated_accuracy_error": pytest.approx(math.sqrt(5 * 3 / 8**3)),
        "mathqa/unanswered": 1 / 8,
        "mathqa/questions": 8,
    }


def write_sums(path: Path, question: Callable[[int], str]) -> None:
    """Forty problems in GSM8K's form."""
    lines = [{"question": question(n), "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def sums(folder: Path) -> list[str]:
    """Overrides of a run that learns what `write_sums` has written."""
    small = [one for one in SMALL if not one.startswith(("data", "model"))]
    return [
        *small, "data=files", f"data.source.files=[{folder}/sums.jsonl]", "data/format=gsm8k",
        "data.validation.fraction=0.3", "model.vocab_size=512", "data.tokenizer.vocab_size=300",
        "evaluation.answers.measure=true", f"output_dir={folder}",
    ]  # fmt: skip


def test_a_prompt_that_fills_the_context_is_left_out(composed: Compose, tmp_path: Path) -> None:
    write_sums(tmp_path / "sums.jsonl", lambda n: f"What is {n} and {n}?" + " Tell me." * (200 if n % 3 == 0 else 0))
    mapping = composed("smoke", *sums(tmp_path), "evaluation.max_problems=10")
    assert run(mapping) == 0
    asked = [row["question"] for row in validation_rows(validate(RunConfig, mapping).data)][:10]
    long = [question for question in asked if "Tell me." in question]
    assert 0 < len(long) < 10
    assert run({**mapping, "task": "evaluate"}) == 0
    assert figures(tmp_path)["gsm8k/left_out"] == len(long)
    assert figures(tmp_path)["gsm8k/questions"] == len(answers(tmp_path)) == len(asked) - len(long)


def test_gsm8k_is_measured_in_training_and_after(composed: Compose, tmp_path: Path) -> None:
    write_sums(tmp_path / "sums.jsonl", lambda n: f"What is {n} and {n}?")
    overrides = [*sums(tmp_path), "evaluation.max_problems=4"]
    assert run(composed("smoke", *overrides)) == 0
    rows = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if "gsm8k/accuracy" in row]
    assert [row["step"] for row in measured] == [0, 2]
    assert run(composed("smoke", *overrides, "task=evaluate")) == 0
    assert figures(tmp_path)["gsm8k/accuracy"] == measured[-1]["gsm8k/accuracy"]
    assert answers(tmp_path)[0]["prompt"].endswith("?\nAnswer:")


def test_data_without_right_answers_is_refused(composed: Compose) -> None:
    with pytest.raises(ConfigError, match="mathqa, gsm8k or multiple_choice, not text"):
        validate(RunConfig, composed("smoke", "evaluation.answers.measure=true"))
