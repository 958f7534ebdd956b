"""The commands that a page of the documentation shows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def commands_of(page: str, start: str = "python src/main.py --config ") -> list[list[str]]:
    """The words after `start` of each command in the blocks of a page below docs/; all its blocks must be commands."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "".join(text for language, text in blocks if not language).replace("\\\n", " ").splitlines()
    assert all(line.startswith(start) for line in lines)
    return [shlex.split(line.removeprefix(start)) for line in lines]
