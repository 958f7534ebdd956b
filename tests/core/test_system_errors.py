"""Whatever the system refuses, wherever it happens, is one line for the user."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretune.core.config import InputError
from pretune.core.system_errors import explained
from pretune.dispatch import run
from pretune.run.folder import write_config
from pretune.tasks.train.running import Instruments, Run

ROOT = Path(__file__).parents[2]
Compose = Callable[..., dict[str, Any]]

REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EFBIG: "free some space",
    errno.EROFS: "choose an output_dir",
    errno.EACCES: "fix its permissions",
    errno.ENAMETOOLONG: "shorter name",
    errno.ENOENT: "put it back",
    errno.EISDIR: "in the way",
    errno.EEXIST: "in the way",
    errno.EMFILE: "ulimit -n",
    errno.ELOOP: "circle",
    errno.EIO: "see to that disk",
    errno.ESTALE: "see to that disk",
}


@pytest.mark.parametrize("number", REMEDIES, ids=errno.errorcode.__getitem__)
def test_every_error_of_the_system_is_one_line_with_a_remedy(number: int) -> None:
    told = explained(OSError(number, os.strerror(number), "runs/a/b"), "runs")
    said = str(told)
    assert said.startswith(f"runs/a/b: {os.strerror(number).lower()}; ")
    assert REMEDIES[number] in said
    assert "\n" not in said


def test_errors_that_are_not_the_systems_stay_what_they_are() -> None:
    assert explained(OSError("cannot find the weights on the hub"), "runs") is None


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENAMETOOLONG, errno.EIO])
def test_an_error_in_training_is_told_and_the_same_command_goes_on(number: int, tiny: Compose) -> None:
    mapping = tiny("name=a", "budget.steps=2", "tracker=none")

    def fail(training: Run, what: object) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(InputError, match=re.escape(os.strerror(number).lower())):
        run(mapping, Instruments(on_begin=fail))
    assert run(mapping) == 0


def pretune(*arguments: str | Path, cwd: Path, **more: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", str(ROOT / "src" / "main.py"), *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([f"name={'n' * 300}"], "file name too long; choose a shorter name"),
        (["output_dir=file"], "not a folder"),
        (["output_dir=circle"], "too many levels of symbolic links"),
    ],
    ids=["long", "file", "circle"],
)
def test_a_folder_that_cannot_be_is_refused_in_one_line(
    overrides: list[str], expected: str, tiny: Compose, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    write_config(tmp_path / "run.yaml", tiny("name=a", "budget.steps=1"))
    process = pretune("--config", "run.yaml", *overrides, cwd=tmp_path)
    _, said = process.communicate(timeout=120)
    assert (process.returncode, said.count("\n")) == (2, 1), said
    assert expected in said


def test_a_reader_that_has_gone_ends_the_program_without_a_traceback(tiny: Compose, tmp_path: Path) -> None:
    write_config(tmp_path / "run.yaml", tiny("name=a", "budget.steps=1"))
    process = pretune("--config", "run.yaml", "task=prepare", "prepare.show=3", cwd=tmp_path)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    assert process.communicate(timeout=120)[1] == ""
