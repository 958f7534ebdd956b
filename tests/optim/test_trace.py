"""progress.txt: reading returns what was written, and an incomplete file is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretune.core.config import InputError
from pretune.optim.budget import Step
from pretune.optim.trace import Trace, read_trace

STEPS = [Step(0.0, 64), Step(1 / 3, 64), Step(1.0, 16)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    trace = Trace(tmp_path / "progress.txt")
    for step in STEPS:
        trace.append(step)
    return tmp_path / "progress.txt"


def test_it_comes_back_bit_for_bit(path: Path):
    assert read_trace(path) == STEPS
    assert path.read_text() == "0.0 64\n0.3333333333333333 64\n1.0 16\n"


@given(st.lists(st.floats(0, 1, exclude_max=True)))
def test_any_progress_comes_back(tmp_path_factory: pytest.TempPathFactory, values: list[float]):
    path = tmp_path_factory.mktemp("trace") / "progress.txt"
    steps = [Step(value, 1) for value in [*values, 1.0]]
    for step in steps:
        Trace(path).append(step)
    assert read_trace(path) == steps


def test_what_comes_after_a_checkpoint_is_taken_anew(path: Path):
    Trace(path).rewind(1)
    for step in STEPS[1:]:
        Trace(path).append(step)
    assert read_trace(path) == STEPS


def test_a_line_that_a_crash_cut_short_is_dropped(path: Path):
    path.write_text(path.read_text() + "0.5")
    Trace(path).rewind(3)
    assert read_trace(path) == STEPS


def test_steps_that_a_crash_has_lost_are_marked(path: Path):
    path.write_text("0.0 64\n")
    Trace(path).rewind(2)
    Trace(path).append(STEPS[2])
    with pytest.raises(InputError, match="line 2 is 'nan 0', not a progress"):
        read_trace(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "ends after 0 steps, before the end of the budget"),
        ("0.0 64\n0.5 64\n", "ends after 2 steps, before the end of the budget"),
        ("0.0 64\n1.5 64\n", "line 2 is '1.5 64'"),
        ("0.0\n", "line 1 is '0.0'"),
        ("hello world\n", "line 1 is 'hello world'"),
        ("0.0 -4\n", "line 1 is '0.0 -4'"),
    ],
)
def test_what_is_not_a_whole_trace_is_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "progress.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        read_trace(tmp_path / "progress.txt")


def test_what_is_not_text_is_refused(tmp_path: Path):
    (tmp_path / "progress.txt").write_bytes(b"\xff\xfe\n")
    with pytest.raises(InputError, match="cannot read"):
        read_trace(tmp_path / "progress.txt")
