"""The output of task=prepare, and chats and mixtures in a whole run."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pretune.core.config import validate
from pretune.data.shards import prepare
from pretune.data.tokenizer import load_tokenizer
from pretune.dispatch import run
from pretune.run.config import RunConfig
from pretune.tasks.prepare.show import show_documents

CHATS = [
    {"conversations": [{"from": "human", "value": f"add {n} and 1"}, {"from": "gpt", "value": f"{n + 1}"},
                       {"from": "human", "value": "sure?"}, {"from": "gpt", "value": "yes"}]}
    for n in range(60)
]  # fmt: skip
BAD = [{"messages": [{"role": "assistant", "content": "hello"}]}, {"messages": [{"role": "user", "content": "hello"}]}]


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*CHATS, *BAD]))
    return path


@pytest.fixture
def chatting(tiny: Callable[..., dict[str, Any]], chats: Path) -> Callable[..., dict[str, Any]]:
    """A run on whole conversations packed together, with a tokenizer trained for the run."""

    def compose(*overrides: str) -> dict[str, Any]:
        packing = ["data.packing.mode=documents", "data.packing.too_long=cut", "data.packing.isolate=true"]
        format = ["data/format=chat_plain", f"data.source.files=[{chats}]", "data.sequence_length=64"]
        return tiny(*format, *packing, *overrides)

    return compose


def test_prepare_shows_figures_reasons_and_what_is_scored(
    chatting: Callable[..., dict[str, Any]], chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(chatting("task=prepare", "prepare.show=2")) == 0
    out = capsys.readouterr().out
    assert f"1 because it starts with the assistant (the first is {chats}, row 61)" in out
    assert f"1 because it has no assistant turn (the first is {chats}, row 62)" in out
    shown = out[out.index("document 1 of") :]
    assert "<|user|>\nadd " in shown
    assert "<|assistant|>\n[[" in shown
    assert "[[yes<|endoftext|>]]" in shown
    assert "document 2 of" in shown
    assert "document 3 of" not in shown
    assert "longer than a row: cut" in out


def test_on_a_terminal_what_is_scored_is_green(chatting: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    config = validate(RunConfig, chatting())
    tokenizer = load_tokenizer(config.data.tokenizer, config.data, tmp_path)
    data = prepare(config.data, tokenizer, tmp_path).train
    file = io.StringIO()
    show_documents(Console(file=file, force_terminal=True), "document", data, tokenizer, 1, 64)
    assert "\x1b[1;32myes<|endoftext|>\x1b[0m" in file.getvalue()
    assert "[[" not in file.getvalue()


def test_text_that_only_spells_a_special_token_is_told_apart_from_one(
    chatting: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": f"{n}?", "completion": "a<|endoftext|>b", "id": n, "lang": "en", "note": None} for n in range(60)
    ]
    file = tmp_path / "spelled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = ("task=prepare", "prepare.show=1", "data/format=prompt_completion", f"data.source.files=[{file}]")
    assert run(chatting(*changes)) == 0
    out = capsys.readouterr().out
    assert "columns of data that data.format does not read: id, lang\n" in out
    held_out = int(re.findall(r"rows left out.*|documents +│ +(\d+) +│ +(\d+)", out)[0][1])
    for side, count in (("train", 60 - held_out), ("validation", held_out)):
        assert (
            f"{side} texts spell special tokens, which stay text (shown after a \\): <|endoftext|> in {count} rows"
            in out
        )
    assert f"(the first is {file}, row " in out
    assert "parse_special=true makes them special tokens" in out
    assert "a\\<|endoftext|>b<|endoftext|>]]" in out
    assert run(chatting(*changes, "data.format.parse_special=true")) == 0
    out = capsys.readouterr().out
    assert "a<|endoftext|>b<|endoftext|>]]" in out
    assert "spell special tokens" not in out


def test_long_documents_are_shown_as_far_as_a_row_goes(
    tiny: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny("task=prepare", "prepare.show=1")) == 0
    assert " tokens more" in capsys.readouterr().out


def test_a_run_on_chats_saves_the_template_and_goes_on_with_it(
    chatting: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    mapping = chatting("budget.steps=2", "samples.prompts=[]", "data.sequence_length=16")
    assert run(mapping) == 0
    folder = tmp_path / "runs" / "smoke"
    assert (folder / "tokenizer" / "chat_template.jinja").read_text() == mapping["data"]["format"]["template"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["data/rows_left_out"] + summary["data/too_long"] > 0
    # A run that starts from it inherits tokenizer and template.
    data = mapping["data"] | {"tokenizer": {"kind": "inherited", "add_tokens": []}}
    data["format"] = data["format"] | {"template": None}
    stage = mapping["stage"] | {"kind": "finetune", "init_from": "smoke"}
    assert run(mapping | {"name": "more", "data": data, "stage": stage}) == 0
    assert (tmp_path / "runs" / "more" / "tokenizer" / "chat_template.jinja").is_file()


def test_a_mixture_reports_the_loss_of_each_set(
    chatting: Callable[..., dict[str, Any]], texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mix = ["data/mix=files", f"data.mix.pretraining.source.files=[{texts}]", "data.mix.pretraining.share=0.5",
           "data.mix.pretraining.validation.fraction=0.2"]  # fmt: skip
    mapping = chatting("budget.steps=4", "samples.prompts=[]", "evaluation.every=2", "report.after_training=true", *mix)
    assert run(mapping) == 0
    folder = tmp_path / "runs" / "smoke"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row for row in rows if "val/loss" in row]
    assert all(
        0 < row["val_pretraining/loss"] < 10 and row["val_pretraining/loss"] != row["val/loss"] for row in evaluated
    )
    assert "val_pretraining/loss" in json.loads((folder / "summary.json").read_text())
    assert "val_pretraining/loss" in (folder / "report.md").read_text()
    capsys.readouterr()
    assert run(mapping | {"task": "prepare", "prepare": {"show": 1}}) == 0
    out = capsys.readouterr().out
    assert "pretraining train" in out
    assert "pretraining document 1 of" in out
