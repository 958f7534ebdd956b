"""A command that is killed at any of its file-system calls goes on when it is given again: nothing is left to do by
hand, and nothing is left over. Training's own tests are in test_resume.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretune.dispatch import run

TESTS = Path(__file__).parent
Compose = Callable[..., dict[str, Any]]
SHORT = ("name=a", "tracker=none", "budget.steps=2", "evaluation.every=null", "samples.prompts=[]")
TASKS = (
    ("task=prepare", "data.packing.mode=documents"),
    ("task=export",),
    ("task=generate", "generate.max_new_tokens=3", "generate.temperature=0"),
    ("task=report",),
)


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 15], ids=["every call", "some calls"])
def test_a_killed_command_goes_on(every: int, tiny: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, trained, empty = (tmp_path / name for name in ("root", "trained", "empty"))
    monkeypatch.setenv("PRETUNE_CACHE", str(root / "cache"))
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    short = (*SHORT, f"output_dir={root / 'runs'}", f"generate.file={tmp_path / 'prompts.txt'}")
    empty.mkdir()
    assert run(tiny(*short)) == 0
    root.rename(trained)
    specs = [
        {
            "mapping": tiny(*short, *task),
            "root": str(root),
            "before": str(empty if task[0] == "task=prepare" else trained),
            "every": every,
            "refusable": task[0] == "task=export",
        }
        for task in TASKS
    ]
    (tmp_path / "specs.json").write_text(json.dumps(specs))
    path = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    done = subprocess.run(
        [sys.executable, str(TESTS / "killed.py"), str(tmp_path / "specs.json")],
        env=os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(int(calls) >= 8 for calls in done.stdout.split())
    assert len(done.stdout.split()) == len(TASKS)
