"""Configurations that an older version wrote lack keys of this one: they get the shipped values, and it is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recorded import losses

from pretune.core.config import ConfigError
from pretune.dispatch import run
from pretune.launch.command_line import main
from pretune.launch.older import completed
from pretune.run.folder import differences, read_config, write_config

Compose = Callable[..., dict[str, Any]]
PowerCut = Callable[..., None]


def without(mapping: dict[str, Any], *keys: str) -> dict[str, Any]:
    """A copy without these keys."""
    copy: Any = {name: without(value) if isinstance(value, dict) else value for name, value in mapping.items()}
    for key in keys:
        section, (*outer, last) = copy, key.split(".")
        for name in outer:
            section = section[name]
        del section[last]
    return copy


@pytest.fixture
def older(tiny: Compose, tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """`older(keys, *overrides)`: the config.yaml of a run that lacks keys, and the whole configuration."""

    def write(keys: list[str], *overrides: str) -> tuple[Path, dict[str, Any]]:
        mapping = tiny(*overrides)
        file = tmp_path / "runs" / mapping["name"] / "config.yaml"
        (file.parent / "checkpoints").mkdir(parents=True)
        write_config(file, without(mapping, *keys))
        return file, mapping

    return write


@pytest.mark.parametrize(("keys", "overrides"), [
    (["generate.frequency_penalty", "optimizer.weight_decay_final"], []),
    (["optimizer.cautious_decay"], ["optimizer=muon"]),
    (["early_stopping", "log_every"], ["log_every=10"]),
    (["data.format.parse_special"], []),
    (["model.attention_scale"], []),
])  # fmt: skip
def test_lacking_keys_get_the_value_that_is_shipped(
    keys: list[str], overrides: list[str], older: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file, mapping = older(keys, *overrides)
    assert completed(read_config(file), file) == mapping
    (line,) = capsys.readouterr().err.splitlines()
    assert all(f"{key}=" in line for key in keys)


def test_nothing_is_said_of_a_whole_configuration(older: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file, mapping = older([])
    assert completed(mapping, file) == mapping
    assert capsys.readouterr() == ("", "")


def test_a_key_whose_value_differs_between_options_must_be_given(older: Any) -> None:
    file, _ = older(["model.num_layers", "seed"])
    with pytest.raises(ConfigError, match=r"lacks model\.num_layers.*add \+\+model\.num_layers=VALUE") as caught:
        completed(read_config(file), file)
    assert "\n" not in str(caught.value)


def test_a_file_of_the_users_own_is_not_completed(tmp_path: Path, tiny: Compose) -> None:
    mapping = without(tiny(), "seed")
    assert completed(mapping, tmp_path / "config.yaml") == mapping


def test_a_run_of_an_older_version_goes_on(
    tiny: Compose, power_cut: PowerCut, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("budget.steps=8", "checkpoint.every=2")
    assert run(tiny("name=whole", *settings)) == 0
    for name, resume in (("one", True), ("two", False)):
        power_cut(tiny(f"name={name}", *settings), 6)
        file = tmp_path / "runs" / name / "config.yaml"
        lacking = ("optimizer.weight_decay_final", "evaluation.answers.frequency_penalty", "generate.frequency_penalty")
        write_config(file, without(read_config(file), *lacking))
        capsys.readouterr()
        if resume:
            assert main(["--config", str(file)]) == 0
        else:
            assert run(tiny(f"name={name}", *settings)) == 0
        said = capsys.readouterr().err
        assert all(key in said for key in lacking)
        assert losses(tmp_path / "runs" / name) == losses(tmp_path / "runs" / "whole")
        assert read_config(file)["optimizer"]["weight_decay_final"] == 1
        capsys.readouterr()
        assert main(["--config", str(file), "task=generate", "generate.prompt=The"]) == 0
        assert "note" not in capsys.readouterr().err


def test_what_was_off_is_not_newer() -> None:
    old = {"batch": {"warmup": None, "tokens": 1}, "data": {"mix": {}, "format": {"variables": {}}}}
    for new, key in (
        ({"batch": {"warmup": {"start": 3}, "tokens": 1}}, "batch.warmup.start"),
        ({"data": {"mix": {"x": {"share": 3}}, "format": {"variables": {}}}}, "data.mix.x.share"),
        ({"data": {"mix": {}, "format": {"variables": {"a": 3}}}}, "data.format.variables.a"),
    ):
        assert list(differences(old, {**old, **new}))[-1] == f"{key}: None -> 3"
    assert list(differences(old, {**old, "seed": 3})) == []
    assert list(differences({**old, "seed": 1}, {**old, "seed": 3})) == ["seed: 1 -> 3"]
