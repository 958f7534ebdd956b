from __future__ import annotations

import io
import math
import re

import pytest
from rich.console import Console

from pretune.core.units import duration, short
from pretune.tracker.console import Screen, open_screen
from pretune.tracker.metrics import METRICS, metric


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain(clock: Clock | None = None) -> tuple[Screen, io.StringIO]:
    out = io.StringIO()
    return Screen("pretrain", Console(file=out), bar=False, clock=clock or Clock()), out


def bar(clock: Clock, width: int = 80) -> tuple[Screen, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, color_system=None)
    return Screen("pretrain", console, bar=True, clock=clock), out


def test_a_pipe_gets_one_line_a_report_and_no_bar() -> None:
    clock = Clock()
    screen, out = plain(clock)
    screen.progress(0, 0.0, math.nan, 0.0)
    clock.now += 60
    screen.progress(250, 0.25, 3.5, 1000.0)
    screen.report(250, {"tokens": 1000, "seconds": 60.0, "train/loss": 3.5, "train/lr": 1e-3})
    screen.close()
    assert out.getvalue() == "step    250   25%  loss 3.5000  lr 1.00e-03  3m00s left\n"


def test_long_lines_are_not_wrapped_in_a_pipe() -> None:
    screen, out = plain()
    screen.report(1, {f"task{i}/accuracy": 0.5 for i in range(20)})
    assert out.getvalue().count("\n") == 1


def test_time_left_counts_from_where_this_session_began() -> None:
    clock = Clock()
    screen, out = plain(clock)
    screen.progress(500, 0.5, 3.0, 1.0)
    clock.now += 30
    screen.progress(600, 0.6, 3.0, 1.0)
    screen.report(600, {"train/loss": 3.0})
    # A tenth took 30 s, so four tenths take two minutes; time before the resume does not count.
    assert "2m00s left" in out.getvalue()


@pytest.mark.parametrize("fraction", [0.0, 1.0, 1.5, math.nan])
def test_any_fraction_can_be_shown(fraction: float) -> None:
    for screen, _ in (plain(), bar(Clock())):
        screen.progress(0, 0.0, math.nan, 0.0)
        screen.progress(1, fraction, math.nan, math.inf)
        screen.report(1, {"train/loss": math.nan, "val/loss": math.inf})
        screen.close()


def test_the_bar_shows_step_losses_speed_and_time_left() -> None:
    clock = Clock()
    screen, out = bar(clock, width=100)
    screen.report(0, {"val/loss": 8.25, "val/perplexity": 3827.6})
    screen.progress(0, 0.0, math.nan, 0.0)
    clock.now += 60
    screen.progress(1234, 0.5, 3.456, 12345.6)
    screen.close()
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n").rstrip().split("\n")[-1]
    for part in ("pretrain", "50%", "step 1,234", "loss 3.456", "val 8.250", "12.3k tok/s", "1m00s left"):
        assert part in last


@pytest.mark.parametrize("width", [20, 60, 80, 200])
def test_the_bar_stays_on_one_line(width: int) -> None:
    clock = Clock()
    screen, out = bar(clock, width)
    for step in range(5):
        clock.now += 1
        screen.progress(123_456 + step, step / 5, 3.456, 123_456.0)
    screen.close()
    # The only line break is the one that close leaves after the bar.
    assert out.getvalue().count("\n") == 1


def test_the_terminal_is_given_back() -> None:
    clock = Clock()
    screen, out = bar(clock)
    screen.progress(1, 0.5, 1.0, 1.0)
    screen.close()
    screen.close()
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h") == 1


def test_what_a_model_writes_moves_no_cursor_and_is_no_markup() -> None:
    screen, out = plain()
    screen.sample(7, "[bold]Once", "\x1b[2J\r\x07 upon [/red] :smile: \u009b31m a\ttime\n\u65e5\u672c")
    text = out.getvalue()
    assert "[bold]Once" in text
    assert "[/red] :smile:" in text
    assert "\u65e5\u672c" in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


def test_an_old_terminal_can_show_anything() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii", errors="strict", newline="")
    screen = open_screen("pretrain", file)
    screen.sample(1, "\u65e5", "\u672c \ud800")
    screen.report(1, {"mathqa/accuracy": 0.5, "mathqa/accuracy_error": 0.1})
    file.flush()
    assert b"sample at step 1" in raw.getvalue()
    file.detach()


def test_metrics_as_people_read_them() -> None:
    assert metric("train/tokens_per_second").line(12345.6) == "12,346 tokens/s"
    assert metric("val/token_accuracy").line(0.4371) == "token accuracy 43.7%"
    assert metric("val_raw/token_accuracy").line(0.4371) == "val_raw/token_accuracy 43.7%"
    assert metric("mathqa/problems").line(480) == "mathqa/problems 480"
    assert metric("mathqa/accuracy").line(0.5, 0.021) == "mathqa/accuracy 50.0% ± 2.1%"
    assert metric("train/loss").line(math.nan) == "loss nan"
    assert metric("nobody/knows").line(0.12345) == "nobody/knows 0.1235"


def test_losses_are_to_fall_and_accuracies_to_rise() -> None:
    assert {metric(name).better for name in ("train/loss", "val/loss", "val_x/loss", "val/bits_per_byte")} == {"lower"}
    assert {metric(name).better for name in ("val/token_accuracy", "gsm8k/accuracy", "preference/accuracy")} == {
        "higher"
    }
    assert METRICS["train/lr"].better is None


def test_units() -> None:
    assert [short(n) for n in (0, 950, 12345.6, 999_999, 4_180_000, 1.31e9)] == [
        "0",
        "950",
        "12.3k",
        "1M",
        "4.18M",
        "1.31B",
    ]
    assert [duration(s) for s in (0, 41.6, 252, 7380, 273600)] == ["0s", "42s", "4m12s", "2h03m", "3d04h"]


def test_a_standard_error_stands_beside_its_figure() -> None:
    screen, out = plain()
    screen.report(1, {"mathqa/accuracy": 0.5, "mathqa/accuracy_error": 0.021, "mathqa/chance": 0.2})
    assert "mathqa/accuracy 50.0% ± 2.1%  mathqa/chance 20.0%" in out.getvalue()
