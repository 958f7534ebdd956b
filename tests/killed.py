"""Kills commands at each of their file-system calls, and runs them once more: python killed.py SPECS.json, a list of

    mapping: the configuration; root: the folder that it reads and writes; before: what lies in `root` at the start;
    every: 1 to kill at every call, n at every nth; refusable: whether the second run may be refused if nothing lacks

Prints the number of calls of each. Each run is a fork of this process, which has imported all that an undisturbed run
imports, so that nothing is imported twice. A call is seen by Python's audit events, before it is made: opening to
write, renaming, making and deleting folders and files.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

EVENTS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.link", "os.symlink", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def forked(mapping: dict[str, Any], root: Path, kill_at: int | None, imported: Path | None = None) -> tuple[int, int]:
    """The exit code of a run, negative if it was killed, and the number of calls that it made. The names of the modules
    that it had at its end go to the file `imported`."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = watched(mapping, root, kill_at, writer)
            if imported is not None:
                imported.write_text("\n".join(sys.modules))
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        calls = len(pipe.read())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), calls


def watched(mapping: dict[str, Any], root: Path, kill_at: int | None, writer: int) -> int:
    from pretune.core.config import UserError
    from pretune.dispatch import run

    calls = 0

    def hook(event: str, given: tuple[Any, ...]) -> None:
        nonlocal calls
        opens = event == "open" and isinstance(given[2], int) and given[2] & WRITES
        if (opens or event in EVENTS) and (
            str(given[0]).startswith(str(root)) or (event != "open" and given[-1] not in (-1, None))
        ):
            calls += 1
            os.write(writer, b".")
            if calls == kill_at:
                os.kill(os.getpid(), 9)

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.addaudithook(hook)
    try:
        return run(mapping)
    except UserError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def check(spec: dict[str, Any]) -> int:
    """Check a command; return the number of its calls."""
    mapping, root, before = spec["mapping"], Path(spec["root"]), Path(spec["before"])

    def restore() -> None:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(before, root)

    restore()
    imported = before.with_name("imported")
    code, calls = forked(mapping, root, None, imported)
    assert code == 0, f"it ends with {code} where nothing kills it"
    whole = content(root)
    for name in imported.read_text().splitlines():
        with contextlib.suppress(ImportError):  # made by hand, not found
            importlib.import_module(name)
    for number in range(1, calls + 1, spec["every"]):
        restore()
        code, _ = forked(mapping, root, number)
        assert code == -9, f"call {number} of {calls}: it ended with {code}"
        half = content(root)
        code, _ = forked(mapping, root, None)
        found = content(root)
        where = f"killed at call {number} of {calls}, "
        refused = spec["refusable"] and code == 2 and half.keys() == whole.keys()
        assert code == 0 or refused, f"{where}it ends with {code}"
        assert found.keys() == whole.keys(), f"{where}other files: {sorted(found.keys() ^ whole.keys())}"
        changed = [name for name in whole if found[name] != whole[name]]
        assert not changed, f"{where}other content: {changed}"
    return calls


if __name__ == "__main__":
    for spec in json.loads(Path(sys.argv[1]).read_text()):
        try:
            print(check(spec))
        except AssertionError as error:
            sys.exit(f"{spec['mapping']['task']}: {error}")
