"""Measure training time, and the loss and speed between two reports."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Stopwatch:
    """Measures training time in seconds, in laps; it is stopped until `start`.

    A device runs asynchronously to the host. A lap therefore waits for the end of the previous step only: the device is
    never idle, and steps are timed one step late. `stop` waits for everything, so the sum of all laps is correct.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._clock = device, clock
        self._mark: float | None = None
        self._end_of_step: Any = None

    @property
    def steps_behind(self) -> int:
        """The number of steps submitted to the device but not yet in any lap: 0 or 1."""
        return int(self._end_of_step is not None)

    def start(self) -> None:
        """Begin a lap, unless one is running."""
        if self._mark is None:
            self._mark = self._clock()

    def lap(self) -> float:
        """End the lap and begin the next; return its seconds."""
        if self._device.type != "cpu":
            before, self._end_of_step = self._end_of_step, torch.get_device_module(self._device).Event()
            self._end_of_step.record()
            if before is not None:
                before.synchronize()
        return self._split()

    def stop(self) -> float:
        """End the lap when the device has finished, and stop; return its seconds, or 0 if the watch is stopped."""
        if self._mark is None:
            return 0.0
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
        seconds, self._mark, self._end_of_step = self._split(), None, None
        return seconds

    def _split(self) -> float:
        assert self._mark is not None, "start it first"
        before, self._mark = self._mark, self._clock()
        return max(self._mark - before, 0.0)  # a clock that is set back takes no time from the budget


@dataclass
class Window:
    """Loss and speed since the last report. The loss stays on its device until it is reported."""

    since: float = 0.0
    """Training seconds at the last report."""
    mfu: float = math.nan
    """Model FLOPs utilization per token per second: FLOPs per token / peak FLOP/s. It is lowered if a run exceeds a
    measured peak."""
    sums: Mapping[str, Tensor | float] = field(default_factory=dict)
    """The loss and the objective's other metrics, summed over scored tokens or pairs."""
    scored: int = 0
    """The number of scored tokens or pairs in the sums."""
    tokens: int = 0
    scored_tokens: int = 0
    skipped: Tensor | float = 0.0
    """The number of steps in the whole run that were skipped because their gradients were not finite."""
    failed: Tensor | float = 0.0
    """How many of the newest steps in a row had a loss or a gradient that is not finite."""
    shown_loss: float = math.nan
    """Training loss of the last report, in nats per scored token or pair."""
    speed: float = 0.0
    """Tokens per second in the window of the last report."""

    def add_step(
        self, sums: Mapping[str, Tensor], skipped: Tensor, scored: int, tokens: int, scored_tokens: int
    ) -> None:
        """Add a step that read `tokens`: `sums` are over `scored` tokens or pairs; `skipped` is 1 if the step was
        skipped, else 0."""
        self.skipped = self.skipped + skipped
        # On the device, like `skipped`: the host does not wait for it.
        self.failed = (self.failed + 1) * torch.maximum(skipped, (~torch.isfinite(sums["loss"])).float())
        self.sums = {name: value + self.sums.get(name, 0) for name, value in sums.items()}
        self.scored += scored
        self.tokens += tokens
        self.scored_tokens += scored_tokens

    def stored(self) -> dict[str, Any]:
        """The window as JSON-serializable numbers: `Window(**stored)` continues with the same metrics."""
        sums = {name: float(value) for name, value in self.sums.items()}
        return {**vars(self), "sums": sums, "skipped": float(self.skipped), "failed": float(self.failed)}

    def metrics(self, seconds: float, lr: float, norm: Tensor) -> dict[str, float]:
        """The metrics to report after `seconds` of training; begins a new window."""
        assert self.sums, "nothing was trained since the last report"
        means = {f"train/{name}": float(value) / max(self.scored, 1) for name, value in self.sums.items()}
        elapsed = seconds - self.since or math.nan  # none has passed on a clock that was set back
        self.shown_loss = means["train/loss"]
        self.speed, scored_speed = self.tokens / elapsed, self.scored_tokens / elapsed
        if self.speed * self.mfu > 1:  # the peak was measured, and came out too low
            self.mfu = 1 / self.speed
        self.since, self.sums, self.scored, self.tokens, self.scored_tokens = seconds, {}, 0, 0, 0
        return {
            **means,
            "train/lr": lr,
            "train/grad_norm": norm.item(),
            "train/tokens_per_second": self.speed,
            "train/mfu": self.speed * self.mfu,
            "train/scored_tokens_per_second": scored_speed,
            "train/skipped_steps": float(self.skipped),
        }


def peak_memory(device: torch.device) -> int | None:
    """Peak memory so far in bytes: torch's allocations on a CUDA GPU, else the whole process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
