"""The metrics that a run has recorded in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, one mapping per row."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def series(folder: Path, name: str) -> list[float]:
    """The values of a metric, from every row that has it."""
    return [row[name] for row in rows(folder) if name in row]
