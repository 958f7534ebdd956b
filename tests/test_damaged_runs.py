"""Whatever happens to a file of a run: a command refuses it in one line, says what it noticed, or gives what it would
have given. Never a traceback, never another result without a word."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recorded import losses, weights

from pretune.core.config import UserError
from pretune.dispatch import run

Compose = Callable[..., dict[str, Any]]
SETTINGS = ("name=a", "tracker=none", "budget.steps=4", "checkpoint.every=2", "log_every=1", "samples.prompts=[]")
TASKS = ("train", "evaluate", "generate", "report", "export")
NOT_READ = ("report.", "curves.png", ".lock")
"""What no command reads: it is written anew."""


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file in one of the ways in which disks, copies and people do; say how."""
    content = bytearray(path.read_bytes())
    how = rng.choice(("flip", "cut", "empty", "delete", "grow", "folder"))
    if how == "delete":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "empty" or not content:
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif how == "grow":
        path.write_bytes(content + bytes(rng.randrange(256) for _ in range(9)))
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    return how


@pytest.mark.parametrize("number", [pytest.param(500, marks=pytest.mark.slow), 12])
def test_a_damaged_run_is_refused_rebuilt_or_remarked_on(
    number: int,
    tiny: Compose,
    power_cut: Callable[..., None],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "runs" / "a"
    power_cut(tiny(*SETTINGS), 4)
    shutil.copytree(folder, tmp_path / "halfway")
    assert run(tiny(*SETTINGS)) == 0
    shutil.copytree(folder, tmp_path / "done")
    expected = losses(folder), weights(folder, 4)
    rng, faults = random.Random(number), []
    for case in range(number):
        task = TASKS[case % len(TASKS)]
        start = "halfway" if task == "train" else "done"
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / start, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(NOT_READ))
        path = rng.choice(files)
        what = f"case {case}: {task} after {damage(path, rng)} of {path.relative_to(folder)}"
        mapping = tiny(*SETTINGS, f"task={task}", "generate.prompt=hi", "generate.max_new_tokens=2")
        capfd.readouterr()
        try:
            code = run(mapping)
        except UserError as error:
            if "\n" in str(error) and "another configuration" not in str(error):
                faults.append(f"{what}: more than one line: {error}")
            continue
        except Exception as error:
            faults.append(f"{what}: {type(error).__name__}: {error}")
            continue
        said = "".join(capfd.readouterr())
        remarked = "note:" in said or "set aside" in said or "not what" in said
        if code != 0:
            faults.append(f"{what}: exit code {code}")
        elif task == "train" and not remarked:
            found = losses(folder), weights(folder, 4)
            if found[0] != expected[0] or any(not found[1][name].equal(one) for name, one in expected[1].items()):
                faults.append(f"{what}: another result, without a word")
    assert not faults, "\n".join(faults)
