"""What is asked of held-out rows: prepared once, checked like shards, and not read from the source again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_data import CHAT, MATHQA, TOKENS, byte_tokenizer, data_config, files, write_lines

from pretune.core.config import InputError, validate
from pretune.data.formats.build import build_formatter
from pretune.data.formats.documents import problems, questions
from pretune.data.held_out import prepare_held_out
from pretune.data.shards import prepare
from pretune.dispatch import run
from pretune.run.assembly import assemble_evaluation
from pretune.run.config import RunConfig
from pretune.run.weights import evaluated_run
from pretune.tasks.evaluate.task import Evaluator

Compose = Callable[..., dict[str, Any]]


def test_it_is_what_the_format_makes_of_the_held_out_rows(tmp_path: Path) -> None:
    config = data_config(format=MATHQA)
    formatter = build_formatter(config.format, TOKENS)
    held_out = prepare(config, byte_tokenizer(), tmp_path).held_out
    assert held_out is not None
    assert list(held_out.problems(None)) == list(problems(config, formatter))
    assert list(held_out.questions(None)) == list(questions(config, formatter))
    assert list(held_out.problems(3)) == list(problems(config, formatter))[:3]


def test_formats_without_problems_have_none(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": f"text {n}"} for n in range(40)])
    assert prepare(data_config(source=files(tmp_path / "a.jsonl")), byte_tokenizer(), tmp_path).held_out is None
    assert prepare_held_out(data_config(format=CHAT), TOKENS, tmp_path) is None


def quiz(folder: Path, **format: Any) -> Any:
    rows = [{"question": f"What is {n}?", "choices": [str(n), str(n + 1)], "answer": "A"} for n in range(40)]
    file = write_lines(folder / "quiz.jsonl", rows)
    section = {"kind": "multiple_choice", "name": "quiz", **format}
    return data_config(source=files(file), format=section, validation={"fraction": 0.5})


def test_other_keys_of_the_format_are_other_problems(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    found = [prepare_held_out(quiz(tmp_path, **keys), TOKENS, cache) for keys in ({}, {"name": "other"}, {})]
    assert None not in found
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("damage", ["byte", "cut", "gone", "record"])
def test_damaged_files_are_prepared_again(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, cache = quiz(tmp_path), tmp_path / "cache"
    before = prepare_held_out(config, TOKENS, cache)
    assert before is not None
    expected = list(before.problems(None))
    (file,) = cache.glob("problems-*/shard-00000/problems.jsonl")
    content = file.read_bytes()
    match damage:
        case "byte":
            file.write_bytes(content.replace(b"What", b"That", 1))
        case "cut":
            file.write_bytes(content[:-9])
        case "gone":
            file.unlink()
        case _:
            (file.parents[1] / "complete.json").write_text("{}")
    after = prepare_held_out(config, TOKENS, cache)
    assert after is not None
    assert list(after.problems(None)) == expected
    assert "prepared problems in" in capsys.readouterr().err


def test_a_source_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    config, cache = quiz(tmp_path), tmp_path / "cache"
    with (tmp_path / "quiz.jsonl").open("a") as file:
        file.write('{"question": ')
    with pytest.raises(InputError, match="not JSON"):
        prepare_held_out(config, TOKENS, cache)
    assert list(cache.glob("problems-*/shard-*")) == []


def test_an_evaluation_does_not_need_the_source(composed: Compose, tmp_path: Path) -> None:
    rows = [{"question": f"What is {n}?", "choices": [str(n), str(n + 1)], "answer": "AB"[n % 2]} for n in range(60)]
    source = write_lines(tmp_path / "quiz.jsonl", rows)
    mapping = composed(
        "smoke", "name=one", f"output_dir={tmp_path}", "data=multiple_choice", f"data.source.files=[{source}]",
        "data.format.name=quiz", "data/tokenizer=trained", "data.tokenizer.vocab_size=300", "model.vocab_size=512",
        "data.validation.fraction=0.3", "budget.steps=1", "precision=fp32", "precision.compile=false",
        "samples.prompts=[]", "evaluation.option_accuracy=true", "evaluation.answers.measure=true",
        "evaluation.answers.max_new_tokens=3",
    )  # fmt: skip
    assert run(mapping) == 0
    config = validate(RunConfig, mapping | {"task": "evaluate"})
    parts = assemble_evaluation(config, evaluated_run(config))
    source.unlink()
    found = Evaluator(config, parts).metrics(parts.model)
    assert found["quiz/chance"] == 0.5
    assert found["quiz/problems"] == found["quiz/questions"] > 9
    assert {"quiz/accuracy", "quiz/generated_accuracy", "quiz/unanswered"} <= found.keys()
