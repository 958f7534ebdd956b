"""Training time, and loss and speed between two reports."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Stopwatch:
    """Training time in seconds, as laps; it stands still until `start`.

    A device works on while the host goes ahead. A lap therefore waits for the end of the step before: the device is
    never idle, and its steps are timed one late. `stop` waits for everything, so that the sum of all laps is right.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._mark: float | None = None
        self._end_of_step: Any = None

    @property
    def steps_behind(self) -> int:
        """Steps that have been given to the device and are not in any lap yet: 0 or 1."""
        return int(self._end_of_step is not None)

    def start(self) -> None:
        """Begin a lap, unless one is under way."""
        if self._mark is None:
            self._mark = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap ended or the watch was started; the next lap begins."""
        if self._device.type != "cpu":
            before, self._end_of_step = self._end_of_step, torch.get_device_module(self._device).Event()
            self._end_of_step.record()
            if before is not None:
                before.synchronize()
        return self._split()

    def stop(self) -> float:
        """Seconds of the last lap, once the device has finished; 0 where the watch stands."""
        if self._mark is None:
            return 0.0
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
        seconds, self._mark, self._end_of_step = self._split(), None, None
        return seconds

    def _split(self) -> float:
        assert self._mark is not None, "start it first"
        before, self._mark = self._mark, time.perf_counter()
        return self._mark - before


@dataclass
class Window:
    """Loss and speed since the last report. The loss stays on its device until it is asked for."""

    since: float = 0.0
    """Training seconds at the last report."""
    mfu: float = math.nan
    """Share of the device's peak that one token per second is: FLOPs per token / peak FLOP/s."""
    loss_sum: Tensor | float | None = None
    scored: int = 0
    tokens: int = 0
    shown_loss: float = math.nan
    """Training loss of the last report, in nats per scored token."""
    speed: float = 0.0
    """Tokens per second up to the last report."""

    def add_step(self, loss_sum: Tensor, tokens: int, scored: int) -> None:
        """Count a step that read `tokens`, `scored` of them with a loss, which sums to `loss_sum`."""
        loss_sum = loss_sum.detach()
        self.loss_sum = loss_sum if self.loss_sum is None else self.loss_sum + loss_sum
        self.tokens += tokens
        self.scored += scored

    def stored(self) -> dict[str, float | None]:
        """All of it as numbers, JSON-like: `Window(**stored)` goes on with the same figures."""
        loss_sum = self.loss_sum.item() if isinstance(self.loss_sum, Tensor) else self.loss_sum
        return {**vars(self), "loss_sum": loss_sum}

    def figures(self, seconds: float, lr: float, norm: Tensor) -> dict[str, float]:
        """The row to report after `seconds` of training; a new window begins."""
        assert self.loss_sum is not None, "nothing was trained since the last report"
        self.shown_loss = float(self.loss_sum) / self.scored
        elapsed = seconds - self.since
        self.speed, scored_speed = self.tokens / elapsed, self.scored / elapsed
        self.since, self.loss_sum, self.scored, self.tokens = seconds, None, 0, 0
        return {
            "train/loss": self.shown_loss,
            "train/lr": lr,
            "train/grad_norm": norm.item(),
            "train/tokens_per_second": self.speed,
            "train/mfu": self.speed * self.mfu,
            "train/scored_tokens_per_second": scored_speed,
        }


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the peak so far: on a GPU of what torch has allocated, else of the whole process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
