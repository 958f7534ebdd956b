"""The state of a training run, what it has spent, and which step comes next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from pretune.compute.loss_scale import LossScale
from pretune.core.config import InputError
from pretune.optim.budget import REMEMBERED, Spent, Step, next_step, usual
from pretune.optim.config import BudgetConfig, Overhead
from pretune.optim.trace import read_trace
from pretune.run.config import RunConfig
from pretune.run.folder import find_trace
from pretune.training.meter import Window


@dataclass
class TrainingState:
    """How far the run is: what a checkpoint stores beside tensors."""

    data: dict[str, str]
    """Fingerprints of the data that it trains and measures on, by set and side."""
    start: str | None
    """What identifies the weights that the run started from; None for random ones."""
    tokenizer: str
    """The fingerprint of the tokenizer."""
    teacher: str | None = None
    """What identifies the weights that it learns from; None without a teacher."""
    step: int = 0
    tokens: int = 0
    """Input tokens read."""
    seconds: float = 0.0
    """Training time, overhead excluded."""
    overhead: dict[str, float] = field(default_factory=lambda: dict.fromkeys(get_args(Overhead), 0.0))
    """Time spent on evaluation, samples, compilation and checkpoints."""
    ending: dict[str, float] = field(default_factory=dict)
    """Duration of the newest evaluation and checkpoint: the end of the run will take as long again."""
    token_seconds: list[float] = field(default_factory=list)
    """Training time per token of the newest steps, from which the budget predicts the last step that fits."""
    progress: float = 0.0
    """Progress at which the newest step ran; 1 is the end."""
    position: int = 0
    """Sequences of the training set read, over all epochs."""
    losses: list[tuple[int, float]] = field(default_factory=list)
    """Step and val/loss of every evaluation: for the best checkpoint, early stopping and resumes."""
    stopped_early: bool = False
    """Whether early stopping has ended the run."""
    sampled_at: int = -1
    validation: dict[str, float] = field(default_factory=dict)
    """Metrics of the newest evaluation."""
    training: dict[str, float] = field(default_factory=dict)
    """Metrics of the newest report."""
    window: Window = field(default_factory=Window)
    """Measurements since then."""
    loss_scale: LossScale = field(default_factory=lambda: LossScale(None))
    recorded: dict[str, int] = field(default_factory=dict)
    """Rows that the tracker had recorded when the run was saved."""

    @property
    def failed(self) -> int:
        """How many of the newest steps in a row had a loss or a gradient that is not finite; waits for the device."""
        return int(self.window.failed)

    def stored(self) -> dict[str, Any]:
        """The state as JSON-like values, for a checkpoint."""
        return {**asdict(self), "window": self.window.stored()}

    @classmethod
    def of(cls, stored: Mapping[str, Any], path: Path) -> TrainingState:
        """The state stored in the checkpoint `path`; InputError if another version wrote it."""
        try:
            window, loss_scale = Window(**stored["window"]), LossScale(**stored["loss_scale"])
            return cls(**{**stored, "window": window, "loss_scale": loss_scale})
        except (KeyError, TypeError):
            raise InputError(
                f"{path} was written by another version of Pretune: resume with that version, or start a new run from "
                "these weights (stage.init_from)"
            ) from None

    def check_data(self, data: Mapping[str, str], name: str) -> None:
        """Raise InputError if the run `name` was trained on other data than `data`, which has the same fingerprints if
        it was only moved: positions would mean other documents, and held-out ones may have been trained on."""
        if changed := [side for side in self.data.keys() | data.keys() if self.data.get(side) != data.get(side)]:
            raise InputError(
                f"run {name} was trained on other data: the documents of {' and '.join(sorted(changed))} have changed "
                f"since step {self.step}; restore them to resume, or start a new run from its weights: "
                f"name=... stage.init_from={name} data/tokenizer=inherited"
            )

    @property
    def evaluated_at(self) -> int:
        """Step of the newest evaluation."""
        return self.losses[-1][0] if self.losses else -1

    @property
    def finished(self) -> bool:
        """Whether the newest step was the last."""
        return self.progress == 1 or self.stopped_early

    def spent(self, budget: BudgetConfig) -> Spent:
        """What counts against the budget, including the final evaluation and checkpoint if they count."""
        overhead = (self.overhead[kind] + self.ending.get(kind, 0.0) for kind in budget.count)
        return Spent(self.step, self.tokens, self.seconds + sum(overhead))

    def totals(self) -> dict[str, float]:
        """The x axes for every row of metrics, beside its step."""
        overhead = {f"time/{kind}": round(seconds, 3) for kind, seconds in self.overhead.items()}
        return {"tokens": self.tokens, "seconds": round(self.seconds, 3), **overhead}

    def advance(self, tokens: int, sequence_length: int, seconds: float, progress: float) -> None:
        """One more step, which read so many `tokens`, took `seconds` and ran at `progress`."""
        self.step += 1
        self.tokens += tokens
        self.position += tokens // sequence_length
        self.seconds += seconds
        self.token_seconds = [*self.token_seconds, seconds / tokens][-REMEMBERED:]
        self.progress = progress

    @contextmanager
    def timed(self, kind: Overhead, clock: Callable[[], float]) -> Iterator[None]:
        """Count the time of the block as overhead."""
        started = clock()
        try:
            yield
        finally:
            seconds = max(clock() - started, 0.0)
            self.overhead[kind] += seconds
            if kind != "compilation":
                self.ending[kind] = seconds


def step_to_come(
    config: RunConfig, state: TrainingState, replayed: Sequence[Step] | None, micro_batch: int, steps_behind: int
) -> Step:
    """The next step by the budget, or that of the replayed run.

    micro_batch: in rows. steps_behind: steps that the device still works on, and the clock has not counted.
    """
    if replayed is not None:
        return replayed[state.step]
    tokens, spent = config.batch.tokens_after(state.tokens), state.spent(config.budget)
    # Before a step has been timed: what it takes at least, at the device's peak speed.
    token_seconds = usual(state.token_seconds) or state.window.mfu
    cost = Spent(1, tokens, tokens * token_seconds)
    spent = replace(spent, seconds=spent.seconds + steps_behind * cost.seconds)
    return next_step(config.budget, spent, cost, micro_batch * config.data.sequence_length, state.progress)


def replayed_steps(config: RunConfig) -> list[Step] | None:
    """The steps of the run that budget.replay names; InputError if they are missing or do not fit this run."""
    if config.budget.replay is None:
        return None
    path = find_trace(config.budget.replay, config.output_dir)
    steps, rows = read_trace(path), config.batch.micro_batch
    micro_batch = config.data.sequence_length * (1 if rows == "auto" else rows)
    if odd := [step.tokens for step in steps if step.tokens % micro_batch]:
        raise InputError(
            f"{path} has a step of {odd[0]} tokens, which is not a multiple of a micro-batch of {micro_batch}; set "
            "data.sequence_length and batch.micro_batch as in that run"
        )
    return steps
