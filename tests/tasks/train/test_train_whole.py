"""What lies in a run's folder is whole, or it is noticed: the tokenizer, the report, the records, the summary."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recorded import losses

from pretune.core.config import InputError
from pretune.dispatch import run
from pretune.run.folder import write_config

ROOT = Path(__file__).parents[3]
Compose = Callable[..., dict[str, Any]]
SHORT = ("name=a", "tracker=none", "budget.steps=4", "checkpoint.every=2", "log_every=1", "samples.prompts=[]")


def test_a_tokenizer_that_cannot_be_written_leaves_no_half_of_one(
    tiny: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = tmp_path / "runs" / "a", os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == "tokenizer_config.json" and "runs" in str(target):
            raise OSError(28, "No space left on device", str(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="no space left"):
        run(tiny(*SHORT))
    assert not (folder / "tokenizer").exists()
    assert not list(folder.glob(".tokenizer*"))
    monkeypatch.undo()
    assert run(tiny(*SHORT)) == 0
    assert sorted(path.name for path in (folder / "tokenizer").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_a_complete_run_without_its_report_gets_it(tiny: Compose, tmp_path: Path) -> None:
    reported = tiny(*SHORT, "report.after_training=true")
    assert run(reported) == 0
    page = tmp_path / "runs" / "a" / "report.html"
    page.unlink()
    assert run(reported) == 0
    assert page.is_file()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[1, 2]",
        lambda text: text.replace('"step": 4', '"step": 5'),
        lambda text: text.replace('"seconds": ', '"seconds": 1'),
    ],
    ids=["cut", "empty", "list", "step", "seconds"],
)
@pytest.mark.parametrize("task", ["train", "report"])
def test_a_damaged_summary_is_said_in_one_line_whose_remedy_helps(
    damage: Callable[[str], str], task: str, tiny: Compose, tmp_path: Path
) -> None:
    assert run(tiny(*SHORT)) == 0
    summary = tmp_path / "runs" / "a" / "summary.json"
    before = summary.read_text()
    summary.write_text(damage(before))
    with pytest.raises(InputError, match=r"summary\.json is damaged .*delete it and run the training again") as said:
        run(tiny(*SHORT, f"task={task}"))
    assert "\n" not in str(said.value)
    summary.unlink()
    assert run(tiny(*SHORT)) == 0
    again, first = json.loads(summary.read_text()), json.loads(before)
    assert {key: again[key] for key in ("step", "val/loss", "recorded")} == {
        key: first[key] for key in ("step", "val/loss", "recorded")
    }
    assert run(tiny(*SHORT, "task=report")) == 0


@pytest.mark.parametrize(("file", "change"), [
    ("metrics.jsonl", lambda text: ""),
    ("metrics.jsonl", lambda text: text.split("\n", 1)[1]),
    ("metrics.jsonl", lambda text: text.replace('"tokens": 2', '"tokens": 9')),
    ("progress.txt", lambda text: ""),
    ("progress.txt", lambda text: text.replace("0.25", "0.35")),
    ("progress.txt", lambda text: "\udcff" + text),
], ids=["emptied", "cut", "changed", "trace emptied", "trace changed", "trace no text"])  # fmt: skip
def test_changed_records_are_noticed_by_a_resume(
    file: str,
    change: Callable[[str], str],
    tiny: Compose,
    power_cut: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    power_cut(tiny(*SHORT), 4)
    path = tmp_path / "runs" / "a" / file
    path.write_bytes(change(path.read_text()).encode(errors="surrogateescape"))
    assert run(tiny(*SHORT)) == 0
    assert f"{file} is not what the run wrote" in capsys.readouterr().out


def test_records_as_they_were_are_not_remarked_on(
    tiny: Compose, power_cut: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    power_cut(tiny(*SHORT), 4)
    assert run(tiny(*SHORT)) == 0
    assert run(tiny(*SHORT, "task=report")) == 0
    out, err = capsys.readouterr()
    assert "not what the run wrote" not in out + err
    metrics = tmp_path / "runs" / "a" / "metrics.jsonl"
    kept = losses(metrics.parent)[1:]
    metrics.write_text(metrics.read_text().split("\n", 1)[1])
    assert run(tiny(*SHORT, "task=report")) == 0
    assert "metrics.jsonl is not what the run wrote" in capsys.readouterr().err
    assert losses(metrics.parent) == kept


@pytest.mark.parametrize("row", ['{"step": "1"}', "{}", "[1]", '{"step": 1, "val/loss": [1]}', '{"step": true}'])
def test_a_row_that_is_none_is_named_by_its_line(row: str, tiny: Compose, tmp_path: Path) -> None:
    assert run(tiny(*SHORT)) == 0
    path = tmp_path / "runs" / "a" / "metrics.jsonl"
    path.write_text(f"{row}\n" + path.read_text())
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 1 is not a row"):
        run(tiny(*SHORT, "task=report"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_more_signals_after_the_save_change_nothing(number: signal.Signals, tiny: Compose, tmp_path: Path) -> None:
    more = ("budget.steps=5000", "checkpoint.every=null", "evaluation.every=null")
    write_config(tmp_path / "run.yaml", tiny(*SHORT, *more))
    command = [sys.executable, str(ROOT / "src" / "main.py"), "--config", str(tmp_path / "run.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "step     10" in line:
            process.send_signal(number)
            break
    while "everything is saved" not in (line := process.stdout.readline()):
        assert line, "it ended without saving"
    while process.poll() is None:
        process.send_signal(number)
        time.sleep(0.001)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "Traceback" not in said
