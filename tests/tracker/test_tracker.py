from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from pretune.tracker.config import NoTrackerConfig
from pretune.tracker.environment import environment, git_commit
from pretune.tracker.files import read_rows
from pretune.tracker.tracker import Tracker

NONE = NoTrackerConfig(kind="none")


def test_everything_lands_in_the_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Tracker(NONE, tmp_path, "demo", "pretrain", {}) as tracker:
        tracker.message("hello")
        tracker.report(1, {"tokens": 10, "seconds": 0.5, "train/loss": math.nan})
        tracker.sample(1, "Once", " upon")
        tracker.finish({"step": 1, "val/loss": math.inf, "device": "cpu"})
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "tokens": 10, "seconds": 0.5, "train/loss": None}]
    assert read_rows(tmp_path / "samples.jsonl") == [{"step": 1, "prompt": "Once", "text": " upon"}]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["name"] == "demo"
    assert summary["stage"] == "pretrain"
    assert summary["val/loss"] is None
    assert summary["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert summary["versions"]["torch"].startswith("2.")
    assert summary["device_name"]
    assert "hello" in capsys.readouterr().out


def test_only_finish_marks_a_run_complete(tmp_path: Path) -> None:
    def crash() -> None:
        with Tracker(NONE, tmp_path, "demo", "pretrain", {}) as tracker:
            tracker.report(1, {"train/loss": 1.0})
            raise KeyError

    with pytest.raises(KeyError):
        crash()
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl"}


def test_a_resumed_run_records_every_step_once(tmp_path: Path) -> None:
    with Tracker(NONE, tmp_path, "demo", "pretrain", {}) as tracker:
        for step in range(1, 31):
            tracker.report(step, {"train/loss": float(step)})
            tracker.sample(step, "a", str(step))
            if step == 20:
                recorded = tracker.recorded()
                tracker.report(step, {"val/loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "train/lo')
    with Tracker(NONE, tmp_path, "demo", "pretrain", {}) as tracker:
        tracker.rewind(20, recorded)
        for step in range(21, 41):
            tracker.report(step, {"train/loss": float(step)})
            tracker.sample(step, "a", str(step))
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == list(range(1, 41))
    assert [row["step"] for row in read_rows(tmp_path / "samples.jsonl")] == list(range(1, 41))


def test_the_commit_is_that_of_the_code_and_of_no_repository_around_it(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    code, foreign = tmp_path / "code", tmp_path / "foreign"
    for folder in (code, foreign):
        folder.mkdir()
        (folder / "a.py").write_text("1")
    assert git_commit(code) is None
    git("init", "-q")
    git("add", "code")
    git("commit", "-qm", "x")
    assert git_commit(code) == git("rev-parse", "HEAD")
    assert git_commit(foreign) is None
    (code / "a.py").write_text("2")
    assert git_commit(code) == git("rev-parse", "HEAD") + "-dirty"


def test_an_unknown_device_is_null() -> None:
    assert environment(None)["device_name"] is None
