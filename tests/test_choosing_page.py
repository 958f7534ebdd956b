"""The page "Which small model?": its commands can be run, and its table has the sizes of the shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
from page_commands import commands_of

from pretune.core.units import short
from pretune.launch.command_line import main
from pretune.launch.inspected import composer
from pretune.tasks.inspect.candidates import find
from pretune.tasks.inspect.facts import facts_of

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")


def test_every_command_is_composed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = commands_of("choosing.md", "python src/main.py ")
    assert len(found) == 5
    for command in found:
        assert main([*command, "--cfg", "job"]) == 0, command


def test_the_table_has_the_sizes_of_its_shapes() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line[:2] == "| "]
    names = next(row for row in rows if row[0] == "model")[1:]
    assert len(names) == 7
    counts = next(row for row in rows if row[0] == "parameters")[1:]
    inside = next(row for row in rows if row[0] == "without embeddings")[1:]
    for name, parameters, without in zip(names, counts, inside, strict=True):
        shape = facts_of(find(name, "runs", composer(()))).shape
        assert shape.parameters is not None
        assert shape.without_embeddings is not None
        assert (short(shape.parameters), short(shape.without_embeddings)) == (parameters, without)
