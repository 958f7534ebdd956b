"""Preferences for tests: pairs whose better side can be learned in a few steps."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

_WORDS = ["the", "a", "house", "red", "blue", "runs", "sees", "under", "over", "quickly", "and", "it", "was"]


def preferences(number: int = 60, seed: int = 3) -> list[dict[str, Any]]:
    """Rows of prompt, chosen and rejected: the chosen side is about cats, the rejected one about dogs."""
    rng = random.Random(seed)

    def answer(animal: str) -> str:
        return " ".join([animal, *rng.choices(_WORDS, k=rng.randint(1, 5)), animal])

    return [
        {"prompt": " ".join(rng.choices(_WORDS, k=3)), "chosen": answer("cat"), "rejected": answer("dog")}
        for _ in range(number)
    ]


def preference_data(file: Path, composed: Callable[..., dict[str, Any]], too_long: str) -> dict[str, Any]:
    """The keys of a data section for such rows in `file`."""
    return {
        "source": {"kind": "files", "files": [str(file)], "format": "auto", "max_rows": None},
        "validation": {"source": None, "fraction": 0.3, "seed": 1, "group_by": "prompt"},
        "format": composed("smoke", "data=ultrafeedback")["data"]["format"],
        "tokenizer": {"kind": "inherited", "add_tokens": []},
        "sequence_length": 256,
        "packing": {"mode": "pairs", "too_long": too_long, "isolate": True},
    }


def write_preferences(path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in (preferences() if rows is None else rows)))
    return path
