"""The YAML files that ship with Pretune: config groups with their options, and run files."""

from __future__ import annotations

import os
from pathlib import Path

CONFIGS = Path(__file__).parents[2] / "config"


def is_group(name: str) -> bool:
    """Whether `name` is a group, such as `optimizer` or `data/source`, rather than a key."""
    return name[:1].isalpha() and bool(options(name))


def options(group: str) -> list[str]:
    """The options of a group; empty for a name that is not a group."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def groups() -> list[str]:
    """Every group that a user can choose an option from."""
    files = (path for path in CONFIGS.glob("*/**/*.yaml") if path.parent.name not in ("run", "common"))
    return sorted({str(path.parent.relative_to(CONFIGS)) for path in files})


def run_names() -> list[str]:
    """Names of the run files."""
    return options("run")


def run_files() -> str:
    """Two lines per run file: its path for `--config`, and the first sentence of its comment."""
    lines = []
    for name in run_names():
        path = CONFIGS / "run" / f"{name}.yaml"
        comments = [line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("# ")]
        comment = " ".join(line for line in comments if "$schema" not in line and "@package" not in line)
        shown = min(os.path.relpath(path), str(path), key=len)
        lines.append(f"  {shown}\n      {comment.split('. ')[0].rstrip('.')}")
    return "\n".join(lines)
