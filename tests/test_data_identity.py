"""A run knows the data that it was trained on, wherever it is now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recorded import losses

from pretune.core.config import InputError
from pretune.dispatch import run
from pretune.run.folder import differences

Compose = Callable[..., dict[str, Any]]
PowerCut = Callable[..., None]
FIVE = "".join(
    f'{{"text": "Number {number} comes before all the others, and nobody has asked."}}\n' for number in range(5)
)


def test_a_run_does_not_go_on_with_other_data(tiny: Compose, power_cut: PowerCut, texts: Path, tmp_path: Path) -> None:
    mapping, folder = tiny("name=mine", "budget.steps=20"), tmp_path / "runs" / "mine"
    power_cut(mapping, 14)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    own = texts.read_text()
    texts.write_text(FIVE + own)
    with pytest.raises(InputError, match=r"run mine was trained on other data: .*stage\.init_from=mine") as caught:
        run(mapping)
    assert "\n" not in str(caught.value)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    texts.write_text(own)
    assert run(mapping) == 0


def test_a_run_goes_on_with_data_that_was_only_moved(
    tiny: Compose, power_cut: PowerCut, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tiny("name=whole", "budget.steps=20")) == 0
    power_cut(tiny("name=cut", "budget.steps=20"), 14)
    moved = texts.rename(tmp_path / "moved.jsonl")
    monkeypatch.setenv("PRETUNE_CACHE", str(tmp_path / "another_cache"))
    assert run(tiny("name=cut", "budget.steps=20", f"data.source.files=[{moved}]")) == 0
    assert losses(tmp_path / "runs" / "cut") == losses(tmp_path / "runs" / "whole")


def test_an_evaluation_says_that_the_data_has_changed(
    tiny: Compose, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mapping = tiny("name=mine", "budget.steps=2")
    assert run(mapping) == 0
    for changed in (False, True):
        capsys.readouterr()
        assert run({**mapping, "task": "evaluate"}) == 0
        assert ("mine was trained on other documents than now" in capsys.readouterr().out) == changed
        texts.write_text(FIVE + texts.read_text())


def test_only_the_place_of_files_may_change_in_any_set() -> None:
    def data(name: str, share: float) -> dict[str, Any]:
        source = {"files": [name], "max_rows": None}
        return {"data": {"source": source, "mix": {"x": {"source": source, "share": share}}}}

    assert list(differences(data("a.jsonl", 0.1), data("b.jsonl", 0.1))) == []
    assert list(differences(data("a.jsonl", 0.1), data("b.jsonl", 0.2))) == ["data.mix.x.share: 0.1 -> 0.2"]
