"""Warnings during training, a line each: other processes use the cores, the budget buys hardly any steps, steps were
skipped, or the device is faster than it was measured to be. And the end of a run that has diverged.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pretune.compute.config import OPTIONS
from pretune.compute.threads import CROWDED, CoreShare
from pretune.run.config import RunConfig
from pretune.tasks.train.state import TrainingState
from pretune.training.divergence import Diverged
from pretune.training.meter import Window

FEW_STEPS = 100
"""A budget of fewer steps trains nothing."""
_WARM_UP_SECONDS = 5.0
"""Training time after which speed and the share of the cores mean something."""


class Monitor:
    """Created when training starts or resumes, and consulted after each step."""

    def __init__(
        self, config: RunConfig, device: torch.device, state: TrainingState, cores: CoreShare | None = None
    ) -> None:
        self._config = config
        self._cores, self._since = cores or CoreShare(), state.seconds
        self._looks_at_cores = device.type == "cpu"
        self._looks_at_budget = config.budget.time is not None and state.step == 0
        self._skipped, self._mfu = float(state.window.skipped), state.window.mfu

    def warnings(self, state: TrainingState) -> Iterator[str]:
        """Warnings after the newest step: usually none. Raises Diverged at a report, which waits for the device anyway,
        when there have been as many bad steps in a row as divergence.patience allows."""
        patience, reports = self._config.divergence.patience, state.step % self._config.log_every == 0 or state.finished
        if patience is not None and reports and state.failed >= patience:
            raise Diverged("the loss or its gradient is", state.step - state.failed + 1)
        warmed_up = state.seconds - self._since > _WARM_UP_SECONDS
        if self._looks_at_budget and state.token_seconds and (warmed_up or state.step >= 3):
            self._looks_at_budget = False
            yield from self._poor_budget(state)
        if self._looks_at_cores and warmed_up:
            self._looks_at_cores = False
            yield from self._crowded_cores()
        if reports:
            yield from self._odd_metrics(state.window)

    def _crowded_cores(self) -> Iterator[str]:
        share = self._cores.value()
        if share < CROWDED:
            yield (
                "warning: other processes use these cores too, and this one runs only "
                f"{share:.0%} of the time that it could; its threads wait for each other: stop the others, or set "
                f"threads={max(torch.get_num_threads() - 1, 1)} or fewer"
            )

    def _odd_metrics(self, window: Window) -> Iterator[str]:
        if window.mfu < self._mfu:
            self._mfu = window.mfu
            yield "the device is faster than it was measured to be at the start; mfu is now a share of what it reached"
        skipped = float(window.skipped)
        if skipped > self._skipped:
            yield (
                f"warning: {skipped - self._skipped:.0f} steps were skipped because their gradients were not finite "
                f"({skipped:.0f} so far); a lower optimizer.lr or optimizer.clip_norm may help"
            )
            self._skipped = skipped

    def _poor_budget(self, state: TrainingState) -> Iterator[str]:
        config, time = self._config, self._config.budget.time
        assert time is not None
        seconds = min(state.token_seconds) * config.batch.tokens
        steps = int(time / seconds)
        others = config.budget.steps, config.budget.tokens and config.budget.tokens // config.batch.tokens
        if steps >= FEW_STEPS or any(limit is not None and limit <= steps for limit in others):
            return
        name = OPTIONS[config.precision.compute]
        yield (
            f"warning: at {seconds:.2g} s per step the budget of {time:,.0f} s is enough for about {steps} steps, too "
            "few to learn much: use a longer budget.time, a smaller model, or fewer batch.tokens"
            + ("" if name == "fp32" else f"; precision is {name} now")
        )
