"""Every metric that a run records: label, unit, format, which direction is better, and whether the console shows it.

Names are `group/metric`: `train/loss`, `val/loss`, `mathqa/accuracy`. A validation metric of another set of data or of
other weights has its group's name too (`val_NAME/loss`), a standard error that of its metric (`NAME_error`), and a
metric of texts of one length that of all (`NAME_at_512`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from pretune.core.units import duration, short

Better = Literal["lower", "higher"]


def _number(value: float) -> str:
    return f"{value:,}" if float(value).is_integer() else f"{value:.4g}"


@dataclass(frozen=True)
class Metric:
    """What there is to know about a metric beside its values."""

    label: str
    unit: str = ""
    format: Callable[[float], str] = _number
    better: Better | None = None
    on_console: bool = True

    def text(self, value: float) -> str:
        """A value as people read it, without its label: `3.4120`, `43.7%`, `12,345`."""
        return self.format(value) if math.isfinite(value) else str(value)

    def line(self, value: float, error: float | None = None) -> str:
        """Label and value, for a line of several: `validation loss 3.4120`, `12,345 tokens/s`, `lr 9.80e-04`."""
        text = self.text(value) if error is None else f"{self.text(value)} ± {self.text(error)}"
        return f"{text} {self.unit}" if self.unit == self.label else f"{self.label} {text}"


_LOSS = Metric("loss", "nats per token", "{:.4f}".format, "lower")
_SHARE = Metric("share", "", "{:.1%}".format)
_SPEED = Metric("tokens/s", "tokens/s", "{:,.0f}".format, "higher")
_COUNT = Metric("count", on_console=False)
_REWARD = Metric("reward", "nats", "{:.4f}".format, on_console=False)

METRICS: dict[str, Metric] = {
    "step": _COUNT,
    "tokens": Metric("tokens", "tokens", short, on_console=False),
    "seconds": Metric("time", "s", duration, on_console=False),
    "train/loss": _LOSS,
    "train/lr": Metric("lr", "", "{:.2e}".format),
    "train/grad_norm": Metric("grad norm", "", "{:.2f}".format),
    "train/tokens_per_second": _SPEED,
    "train/scored_tokens_per_second": replace(_SPEED, on_console=False),
    "train/mfu": Metric("mfu", "", "{:.1%}".format, "higher"),
    "train/skipped_steps": _COUNT,
    "train/loss_scale": _COUNT,
    "train/overflows": _COUNT,
    "val/loss": replace(_LOSS, label="validation loss"),
    "val/perplexity": Metric("perplexity", "", "{:,.2f}".format, "lower"),
    "val/bits_per_byte": Metric("bits/byte", "bits per byte", "{:.4f}".format, "lower"),
    "val/token_accuracy": Metric("token accuracy", "", "{:.1%}".format, "higher"),
    "train/cross_entropy": replace(_LOSS, label="cross-entropy"),
    "train/divergence": Metric("divergence", "nats per token", "{:.4f}".format, "lower"),
    "val/divergence": Metric("validation divergence", "nats per token", "{:.4f}".format, "lower"),
    "preference/accuracy": Metric("preference/accuracy", "", "{:.1%}".format, "higher"),
    "preference/pairs": _COUNT,
}
"""Metrics by name."""

TASK_SHARES: dict[str, Metric] = {
    "accuracy": replace(_SHARE, better="higher"),
    "accuracy_per_token": replace(_SHARE, better="higher", on_console=False),
    "lm_eval_acc": replace(_SHARE, better="higher", on_console=False),
    "lm_eval_acc_norm": replace(_SHARE, better="higher", on_console=False),
    "generated_accuracy": replace(_SHARE, better="higher"),
    "chance": _SHARE,
    "unanswered": replace(_SHARE, better="lower"),
    "no_grid": replace(_SHARE, better="lower"),
    "voted_accuracy": replace(_SHARE, better="higher"),
    "voted_pass_2": replace(_SHARE, better="higher", on_console=False),
    "sampled_pass_1": replace(_SHARE, better="higher", on_console=False),
    "sampled_pass_2": replace(_SHARE, better="higher", on_console=False),
    "trained_accuracy": replace(_SHARE, better="higher"),
    "trained_voted_accuracy": replace(_SHARE, better="higher"),
    "trained_voted_pass_2": replace(_SHARE, better="higher", on_console=False),
    "trained_sampled_pass_1": replace(_SHARE, better="higher", on_console=False),
    "trained_sampled_pass_2": replace(_SHARE, better="higher", on_console=False),
    "trained_no_grid": replace(_SHARE, better="lower"),
}
"""What is measured of a task's problems, as `TASK/...`."""

_BY_LAST_NAME: dict[str, Metric] = {
    **TASK_SHARES,
    "problems": _COUNT,
    "questions": _COUNT,
    "tokens": _COUNT,
    "reward_chosen": _REWARD,
    "reward_rejected": _REWARD,
    "token_accuracy": METRICS["val/token_accuracy"],
    "trained_token_accuracy": METRICS["val/token_accuracy"],
    "loss": METRICS["val/loss"],
    "perplexity": METRICS["val/perplexity"],
    "bits_per_byte": METRICS["val/bits_per_byte"],
    "divergence": METRICS["val/divergence"],
}
"""Metrics of any group, such as `gsm8k/accuracy` and `val_raw/loss`: their labels are their whole names."""


def metric(name: str) -> Metric:
    """What there is to know about the metric `name`; of an unknown one, how to write a number."""
    if name in METRICS:
        return METRICS[name]
    if name.startswith("time/"):
        return Metric(name, "s", duration, on_console=False)
    known = _BY_LAST_NAME.get(re.sub(r"_at_\d+$", "", name.rpartition("/")[2]))
    return Metric(name) if known is None else replace(known, label=name)


def error_of(name: str) -> str:
    """The name of a metric's standard error."""
    return f"{name}_error"


def is_task_share(name: str) -> bool:
    """Whether `name` is measured of a task's problems: `mathqa/accuracy`, `gsm8k/unanswered`."""
    task, _, last = name.partition("/")
    return re.fullmatch(r"train|val\w*", task) is None and last in TASK_SHARES
