"""Divergence: the loss or its gradient stays not finite, and training cannot go on."""

from __future__ import annotations

EXIT_DIVERGED = 3
"""Exit code of a run that has diverged; its last good checkpoint is kept."""


class Diverged(Exception):
    """Raised to end a run that has diverged, with what is not finite, and the first step at which it was not."""

    def __init__(self, what: str, since: int) -> None:
        super().__init__(f"diverged: {what} not finite since step {since:,}")


def what_to_try(error: Diverged, saved: int | None, name: str) -> str:
    """The line for the user. saved: the step of the newest checkpoint, if any; name: of the run."""
    kept = "no checkpoint was saved before" if saved is None else f"the checkpoint of step {saved:,} is kept"
    return (
        f"{error}; {kept}. Train again under another name, for instance name={name}-2, with a lower optimizer.lr or "
        "optimizer.clip_norm, a longer schedule.warmup, or precision=fp32"
    )
