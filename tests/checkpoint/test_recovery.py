"""A damaged checkpoint costs an interval, not the run: the newest whole one is taken, and the rest is said."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged import cut, flip
from recorded import losses, weights
from test_store import saved

from pretune.checkpoint import store as checkpoint
from pretune.checkpoint.recovery import newest_whole
from pretune.core.config import InputError
from pretune.dispatch import run
from pretune.tasks.train.running import Instruments

Compose = Callable[..., dict[str, Any]]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "weights cut": lambda path: cut(path / "model.safetensors"),
    "weights flipped": lambda path: flip(path / "model.safetensors"),
    "optimizer gone": lambda path: (path / "optimizer.safetensors").unlink(),
    "state flipped": lambda path: flip(path / "state.json"),
    "state empty": lambda path: (path / "state.json").write_bytes(b""),
    "state gone": lambda path: (path / "state.json").unlink(),
    "all gone": lambda path: [file.unlink() for file in path.iterdir()],
    "a file": lambda path: (shutil.rmtree(path), path.write_text("x")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_the_newest_whole_one_is_taken_and_the_damaged_are_set_aside(
    damage: Callable[[Path], object], tmp_path: Path
) -> None:
    assert newest_whole(tmp_path) == (None, [])
    for step in (5, 10, 15):
        saved(tmp_path, step)
    damage(tmp_path / "step_00000015")
    found, said = newest_whole(tmp_path)
    assert found == tmp_path / "step_00000010" == checkpoint.newest(tmp_path)
    assert len(said) == 1
    assert "set aside as damaged_step_00000015" in said[0]
    assert "going on from step_00000010" in said[0]
    assert newest_whole(tmp_path) == (found, [])

    saved(tmp_path, 15)  # trained again, and damaged again
    damage(tmp_path / "step_00000015")
    assert newest_whole(tmp_path)[0] == found
    assert sorted(path.name for path in tmp_path.glob("damaged*")) == [
        "damaged_step_00000015",
        "damaged_step_00000015_2",
    ]


def test_where_none_is_whole_nothing_is_changed(tmp_path: Path) -> None:
    for step in (5, 10):
        cut(saved(tmp_path, step) / "model.safetensors")
    with pytest.raises(InputError, match=r"no checkpoint in .* is whole \(step_00000010: .*damaged.*restore"):
        newest_whole(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000005", "step_00000010"]


def test_a_wrong_name_is_said_with_the_right_one(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    saved(tmp_path, 10).rename(tmp_path / "step_00000099")
    found, said = newest_whole(tmp_path)
    assert found == tmp_path / "step_00000005"
    assert "step_00000099 is the checkpoint of step 10" in said[0]


def test_a_run_loses_an_interval_and_ends_where_it_would_have(
    tiny: Compose, power_cut: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("tracker=none", "budget.steps=20", "checkpoint.every=5", "samples.prompts=[]")
    assert run(tiny("name=whole", *settings)) == 0
    runs = tmp_path / "runs"
    power_cut(tiny("name=cut", *settings), 14)
    flip(runs / "cut" / "checkpoints" / "step_00000010" / "optimizer.safetensors")
    capsys.readouterr()
    assert run(tiny("name=cut", *settings)) == 0
    assert "step_00000010" in capsys.readouterr().err
    assert losses(runs / "cut") == losses(runs / "whole")
    a, b = weights(runs / "cut", 20), weights(runs / "whole", 20)
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_a_step_that_is_renamed_while_it_trains_is_saved_once_more(tiny: Compose, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a" / "checkpoints"
    saves: list[object] = []

    def begin(training: Any, what: object) -> None:
        saves.extend([what] if what == "checkpoint" else [])
        if training.state.step == 5 and (folder / "step_00000005").exists():
            (folder / "step_00000005").rename(folder / "step_00000099")

    settings = ("name=a", "tracker=none", "budget.steps=8", "checkpoint.every=5", "checkpoint.keep=null")
    assert run(tiny(*settings), Instruments(on_begin=begin)) == 0
    assert len(saves) <= 3
