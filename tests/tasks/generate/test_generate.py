"""task=generate from a user's view: a prompt, a file, a chat, and errors."""

from __future__ import annotations

import gzip
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from pretune.core.config import ConfigError, InputError, validate
from pretune.dispatch import run
from pretune.generation.texts import Piece, Text
from pretune.run.config import RunConfig
from pretune.run.generator import TextGenerator, assemble_generator
from pretune.run.model import evaluation_model
from pretune.run.tokenizer import assemble_tokenizer
from pretune.run.weights import evaluated_run
from pretune.tasks.generate.chat import chat
from pretune.tasks.generate.file import answer_file
from pretune.tasks.generate.task import answer_prompt
from pretune.training.signals import EXIT_STOPPED, Interrupts, Stop

Compose = Callable[..., dict[str, Any]]
T = TypeVar("T", bound=TextGenerator)
CPU = torch.device("cpu")
GREEDY = ["task=generate", "generate.temperature=0", "generate.max_new_tokens=6", "precision=fp32"]


@pytest.fixture
def trained(tiny: Compose) -> Compose:
    """`trained(*overrides)`: generates with a run of two steps."""
    assert run(tiny("name=one", "budget.steps=2", "samples.prompts=[The cat]", "precision=fp32")) == 0
    return lambda *overrides: tiny("name=one", *GREEDY, *overrides)


def replaced(kind: type[T], mapping: dict[str, Any]) -> tuple[T, RunConfig]:
    """The generator of a run as another `kind`, and the run's configuration."""
    config = validate(RunConfig, mapping)
    model = evaluation_model(config, evaluated_run(config), CPU)
    generator = assemble_generator(config, config.generate, model, assemble_tokenizer(config), CPU)
    return kind(**vars(generator)), config


def printed(mapping: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert run(mapping) == 0
    return capsys.readouterr().out


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompt_file_and_chat_write_the_same(
    trained: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = printed(trained("generate.prompt=The cat"), capsys)
    assert text.startswith("The cat")
    assert text.endswith("\n")
    (tmp_path / "prompts.txt").write_text("A dog and a house\n\nThe cat\n")
    questions = ["A dog and a house", {"prompt": "The cat", "id": 3}, {"text": "The cat"}, {"messages": []}]
    questions[3] = {"messages": [{"role": "user", "content": "The cat"}]}
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    (tmp_path / "array.json.gz").write_bytes(gzip.compress(json.dumps(questions, indent=1).encode("utf-16")))
    (tmp_path / "table.csv").write_text("prompt,id\nA dog and a house,1\nThe cat,2\n")
    generated = tmp_path / "runs" / "one" / "generated"
    printed(trained(f"generate.file={tmp_path}/prompts.txt"), capsys)
    (written,) = generated.iterdir()
    assert re.fullmatch(r"prompts-step-2-[0-9a-f]{8}\.jsonl", written.name)
    lines = rows(written)
    assert [row["prompt"] for row in lines] == ["A dog and a house", "The cat"]
    assert "The cat" + lines[1]["text"] + "\n" == text
    assert (lines[1]["ended"], lines[1]["tokens"]) == ("length", 6)
    output = tmp_path / "elsewhere" / "texts.jsonl"
    for batch in (1, 3):
        printed(
            trained(
                f"generate.file={tmp_path}/prompts.jsonl", f"generate.output={output}", f"generate.batch_size={batch}"
            ),
            capsys,
        )
        found = rows(output)
        assert [row["prompt"] for row in found] == questions
        assert [row["text"] for row in found] == [lines[0]["text"], *[lines[1]["text"]] * 3]
    printed(trained(f"generate.file={tmp_path}/array.json.gz", f"generate.output={output}"), capsys)
    assert rows(output) == found
    printed(trained(f"generate.file={tmp_path}/table.csv", f"generate.output={output}"), capsys)
    assert [row["text"] for row in rows(output)] == [row["text"] for row in lines]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\nThe cat\n/quit\nThe cat\n"))
    talk = printed(trained("generate.chat=true"), capsys).splitlines(keepends=True)
    assert "stands alone" in talk[0]
    assert "".join(talk[1:]) == lines[1]["text"] + "\n"


def test_a_chat_holds_the_conversation_and_starts_anew(
    trained: Compose, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Interrupted(TextGenerator):
        def stream(self, prompt: Sequence[int]) -> Iterator[Piece]:
            asked.append(self.tokenizer.decode(prompt))
            if len(asked) == 2:
                yield Piece(0, "one", 1, None)
                raise Stop  # somebody pressed Ctrl-C
            yield Piece(0, " fine", 1, "end")

    mapping = trained("data/format=chat_plain", "generate.chat=true", "generate.system=Be brief.")
    generator, config = replaced(Interrupted, mapping)
    monkeypatch.setattr(sys, "stdin", io.StringIO("How?\nWhat?\nAnd?\n/new\nLast?\n"))
    capsys.readouterr()
    assert chat(generator, config) == 0
    talk = capsys.readouterr().out
    system = "<|system|>\nBe brief.\n"
    first = f"{system}<|user|>\nHow?\n<|assistant|>\n"
    assert asked[0] == first
    assert asked[1] == f"{first}fine\n<|user|>\nWhat?\n<|assistant|>\n"
    assert asked[2].endswith("one\n<|user|>\nAnd?\n<|assistant|>\n")
    assert asked[3] == f"{system}<|user|>\nLast?\n<|assistant|>\n"
    assert "one ...\n" in talk


def test_a_question_is_put_as_in_training_unless_told_otherwise(
    trained: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    class Agreeing(TextGenerator):
        def stream(self, prompt: Sequence[int]) -> Iterator[Piece]:
            asked.append(self.tokenizer.decode(prompt))
            yield Piece(0, "yes", 1, "end")

    generator, _ = replaced(Agreeing, trained("data/format=instruction"))
    for template, expected in ((True, "yes\n"), (False, "Is it?yes\n")):
        capsys.readouterr()
        assert answer_prompt(generator, "Is it?", template) == 0
        assert capsys.readouterr().out == expected
    assert asked[0].endswith("### Instruction:\nIs it?\n\n### Response:\n")
    assert asked[1] == "Is it?"


def test_what_is_done_when_a_signal_comes_is_written(
    trained: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stopped(TextGenerator):
        def generate(self, prompts: Sequence[Sequence[int]], batch_size: int) -> Iterator[tuple[int, Text]]:
            yield next(super().generate(prompts, batch_size))
            raise Stop

    (tmp_path / "p.txt").write_text("The cat\nA dog\n")
    mapping = trained(f"generate.file={tmp_path}/p.txt", f"generate.output={tmp_path}/o.jsonl")
    generator, config = replaced(Stopped, mapping)
    with Interrupts() as interrupts:
        assert answer_file(generator, config.generate, tmp_path, "step-2", interrupts) == EXIT_STOPPED
    assert len(rows(tmp_path / "o.jsonl")) == 1
    assert "1 of 2 texts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, "cannot read .*gone.txt"),
        ("empty.txt", "\n \n", "has no prompts"),
        ("bad.jsonl", '{"prompt": "a"}\n{"prompt"\n', "bad.jsonl line 3, column 1 is not JSON.* begins in line 2"),
        ("blank.jsonl", '{"prompt": "a"}\n{"prompt": " "}\n', "row 2 is an empty prompt"),
        ("list.jsonl", "[1]\n", "row 1 is neither text nor"),
        ("turns.jsonl", '{"messages": [{"role": "user"}]}\n', "row 1 is neither text nor"),
        ("none.jsonl", '{"messages": []}\n', "there is nothing to answer"),
        ("other.jsonl", '{"prompts": "a"}\n', "has no field 'text'"),
        ("null.jsonl", '{"text": null}\n', "row 1 cannot be a prompt: it has no text"),
        ("long.txt", "a\n" + "the cat " * 600 + "\n", "prompt 2 has .* room for 512"),
        ("latin.txt", b"caf\xe9\n", "line 1 is not UTF-8 text"),
        ("cut.jsonl.gz", gzip.compress(b'{"prompt": "a"}', mtime=0)[:-9], "cannot be decompressed"),
    ],
)
def test_a_file_that_cannot_be_answered(
    trained: Compose, tmp_path: Path, name: str, content: Any, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        run(trained(f"generate.file={path}"))


def test_what_makes_no_sense_is_told(trained: Compose, tmp_path: Path) -> None:
    for overrides, message in (
        ([], "there is no prompt"),
        (["generate.prompt=x", "generate.chat=true"], "exclude each other"),
        (["generate.prompt=' '"], "generate.prompt is empty"),
        (["generate.prompt=x", "generate.end_tokens=['<|endoftex|>']"], "did you mean '<|endoftext|>'"),
        ([f"generate.prompt={'the cat ' * 600}"], "prompt 1 has"),
    ):
        with pytest.raises((ConfigError, InputError), match=message.replace("|", r"\|")):
            run(trained(*overrides))
    (tmp_path / "p.txt").write_text("a\n")
    with pytest.raises(InputError, match="cannot write"):
        run(trained(f"generate.file={tmp_path}/p.txt", f"generate.output={tmp_path}/p.txt/o.jsonl"))


def test_texts_of_one_prompt_file_do_not_replace_those_of_another(
    trained: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [tmp_path / "a" / "q.txt", tmp_path / "b" / "q.txt", tmp_path / "b" / "q.jsonl"]
    for number, place in enumerate(places):
        place.parent.mkdir(exist_ok=True)
        place.write_text(json.dumps(f"The cat {number}") + "\n")
        printed(trained(f"generate.file={place}"), capsys)
    printed(trained(f"generate.file={places[0]}", "generate.max_new_tokens=3"), capsys)
    generated = tmp_path / "runs" / "one" / "generated"
    written = {path.name: path.read_text() for path in generated.iterdir()}
    assert len(written) == 4
    assert {rows(generated / name)[0]["tokens"] for name in written} == {3, 6}
    printed(trained(f"generate.file={places[0]}", "generate.batch_size=1"), capsys)
    assert written == {path.name: path.read_text() for path in generated.iterdir()}


@pytest.mark.parametrize("way", ["itself", "a link to it"])
def test_prompts_are_not_overwritten_by_their_texts(way: str, trained: Compose, tmp_path: Path) -> None:
    prompts, output = tmp_path / "q.jsonl", tmp_path / "q.jsonl"
    prompts.write_text('"The cat"\n')
    if way != "itself":
        (output := tmp_path / "link.jsonl").symlink_to(prompts)
    with pytest.raises(InputError, match=r"generate\.output: .* is generate\.file itself"):
        run(trained(f"generate.file={prompts}", f"generate.output={output}"))
    assert prompts.read_text() == '"The cat"\n'
