"""A run is the one that lies where its config.yaml lies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretune.core.config import ConfigError
from pretune.launch.command_line import main
from pretune.launch.compose import composed, plain
from pretune.launch.place import placed
from pretune.run.folder import write_config


def a_run(folder: Path, mapping: dict[str, Any]) -> Path:
    """A folder with a configuration and a metric."""
    folder.mkdir(parents=True)
    write_config(folder / "config.yaml", mapping)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder / "config.yaml"


def named(file: Path, *overrides: str) -> tuple[str, str]:
    """The name and output_dir that the command line hands over."""
    with composed(file, placed(file, overrides)) as config:
        mapping = plain(config, file)
    return mapping["name"], mapping["output_dir"]


OLD = {"name": "old", "output_dir": "/elsewhere"}


def test_a_run_has_the_name_and_the_place_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = a_run(tmp_path / "it's ${here} é" / "new", OLD)
    monkeypatch.chdir(tmp_path)
    assert named(file) == ("new", "it's ${here} é")
    monkeypatch.chdir(file.parent)
    assert named(file) == ("new", str(file.parent.parent))
    assert named(file, "name=third") == ("third", str(file.parent.parent))
    assert named(file, "output_dir=there") == ("new", "there")
    assert named(file, "++name=a", "++output_dir=b") == ("a", "b")


def test_a_link_to_a_run_is_that_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "runs" / "new", OLD)
    (tmp_path / "latest").symlink_to("runs/new")
    assert named(tmp_path / "latest" / "config.yaml") == ("new", "runs")


def test_other_files_say_themselves_what_they_are(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", OLD)
    beside = run.with_name("mine.yaml")
    beside.write_text(run.read_text())
    alone = tmp_path / "config.yaml"
    alone.write_text(run.read_text())
    assert named(beside) == named(alone) == ("old", "/elsewhere")


def test_a_folder_with_another_name_is_refused(tmp_path: Path) -> None:
    file = a_run(tmp_path / "my run", OLD)
    with pytest.raises(ConfigError, match=r"my run holds a run, .* rename the folder") as caught:
        placed(file, [])
    assert "\n" not in str(caught.value)
    assert placed(file, ["name=x", "output_dir=y"]) == ["name=x", "output_dir=y"]


def test_what_is_shown_and_what_is_swept_is_the_run_that_lies_there(
    tiny: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = a_run(tmp_path / "moved" / "new", tiny("budget.steps=1", "samples.prompts=[]"))
    assert main(["--config", str(file), "--cfg", "job"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["name"] == "new"
    assert main(["--config", str(file), "-m", "seed=1,2"]) == 0
    assert {path.name for path in (tmp_path / "moved").iterdir()} - {".sweeps"} == {"new", "new,seed=1", "new,seed=2"}
