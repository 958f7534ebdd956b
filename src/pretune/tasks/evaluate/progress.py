"""Progress bars of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from pretune.core.progress_bar import counted

T = TypeVar("T")


def watched(task: str, items: Iterable[T], total: int, title: str) -> Iterable[T]:
    """`items` with a progress bar, except during training, which already shows one."""
    return items if task == "train" else counted(items, title, total)
