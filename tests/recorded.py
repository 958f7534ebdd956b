"""What a run has recorded in its folder: metrics, weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
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
    """Weights and optimizer state of the checkpoint of that step, also of one that processes wrote together."""
    path = folder / "checkpoints" / f"step_{step:08d}"
    found = {name: one for file in path.glob("*.safetensors") for name, one in load_file(file).items()}
    if (path / "shards").is_dir():
        metadata = dcp.HuggingFaceStorageReader(str(path / "shards")).read_metadata().state_dict_metadata
        stored: dict[str, Any] = {name: torch.empty(one.size) for name, one in metadata.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(stored, storage_reader=dcp.HuggingFaceStorageReader(str(path / "shards")), no_dist=True)
        found |= {name.partition(":")[2]: one for name, one in stored.items()}
    return found
