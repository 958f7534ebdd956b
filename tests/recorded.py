"""What a run has recorded in its folder: metrics, weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, one mapping per row."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def series(folder: Path, name: str) -> list[float]:
    """The values of a metric, from every row that has it."""
    return [row[name] for row in rows(folder) if name in row]


def losses(folder: Path) -> list[tuple[int, float | None, float | None]]:
    """Step, training loss and validation loss of every row."""
    return [(row["step"], row.get("train/loss"), row.get("val/loss")) for row in rows(folder)]


def weights(folder: Path, step: int) -> dict[str, Tensor]:
    """Weights and optimizer state of the checkpoint of that step."""
    path = folder / "checkpoints" / f"step_{step:08d}"
    return {name: one for file in path.glob("*.safetensors") for name, one in load_file(file).items()}
