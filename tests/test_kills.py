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
TASKS = {
    "prepare": ("task=prepare", "data.packing.mode=documents"),
    "export": ("task=export",),
    "generate.file": ("task=generate", "generate.max_new_tokens=3", "generate.temperature=0"),
    "report": ("task=report",),
}


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 7], ids=["every call", "some calls"])
@pytest.mark.parametrize("task", ["prepare", "export", "generate.file", "report"])
def test_a_killed_command_goes_on(
    task: str, every: int, tiny: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, before = tmp_path / "root", tmp_path / "before"
    monkeypatch.setenv("PRETUNE_CACHE", str(root / "cache"))
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    mapping = tiny(*SHORT, f"output_dir={root / 'runs'}", *TASKS[task])
    root.mkdir()
    if task != "prepare":
        assert run({**mapping, "task": "train"}) == 0
    root.rename(before)
    mapping["generate"]["file"] = str(tmp_path / "prompts.txt")
    spec = {"mapping": mapping, "root": str(root), "before": str(before), "every": every}
    (tmp_path / "spec.json").write_text(json.dumps({**spec, "refusable": task == "export"}))
    path = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    done = subprocess.run(
        [sys.executable, str(TESTS / "killed.py"), str(tmp_path / "spec.json")],
        env=os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 8
