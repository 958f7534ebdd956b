"""A user's file sets keys, and nothing else: it is read as data, and what is wrong with it is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretune.core.config import ConfigError, UserError
from pretune.launch.compose import composed, plain
from pretune.launch.groups import CONFIGS
from pretune.launch.user_files import check

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [*{before}, *{before}, *{before}, *{before}, *{before}, *{before}, *{before}, *{before}]\n"
    for before, name in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)


@pytest.mark.parametrize(("content", "message"), [
    ("hydra: {callbacks: {x: {_target_: os.system}}}\n", "line 1: Hydra's own settings"),
    ("name: x\nhydra:\n  job: {env_set: {A: b}}\n", "line 2: Hydra's own settings"),
    ("hydra: 3\n", "Hydra's own settings"),
    ("defaults: [/run/smoke, /hydra/callbacks/evil]\n", "Hydra's own settings"),
    ("defaults:\n  - /run/smoke\n  - override /hydra/launcher: joblib\n", "line 3: Hydra's own settings"),
    ("defaults:\n  - /run/smoke\n  - optimizer@hydra.callbacks: evil\n", "line 3: Hydra's own settings"),
    ("defaults:\n  - evil@_global_.hydra.callbacks\n", "line 2: Hydra's own settings"),
    ("defaults: ['${x}']\nx: hydra/callbacks/evil\n", "Hydra's own settings"),
    ("# @package hydra.callbacks\nx: {_target_: os.system}\n", "Hydra's own settings"),
    ("defaults: {a: b}\n", "line 1: defaults must be a list"),
    ("defaults:\n  - a: {b: c}\n", "line 2: an entry of defaults"),
    ("42\n", "holds no keys"),
    ("- a\n- b\n", "holds no keys"),
    ("", "is empty"),
    ("# only a comment\n", "is empty"),
    ("a: !!binary aGk=\n", "line 1: values of type binary"),
    ("a: 1\nb: !!python/object:os.system {}\n", "line 2: values of type python/object:os.system"),
    ("a: &a [*a]\n", "contains itself"),
    (BOMB, "aliases expand to more than 100,000 values"),
    ("a: [" * 5000, "nested too deeply|line 1"),
    ("a: *nothing\n", "line 1: found undefined alias"),
    (b"name: caf\xe9\n", "line 1 is not UTF-8 text"),
    ("name: x\n".encode("utf-16"), "line 1 is not UTF-8 text"),
    (b"\x7fELF\x00\x01\x02", "is not YAML text"),
])  # fmt: skip
def test_what_a_file_may_not_hold(tmp_path: Path, content: str | bytes, message: str) -> None:
    file = tmp_path / "it.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as caught:
        check(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("way", ["part", "part.yaml", "/part", "group/part", "group: part", "override /group: [part]"])
def test_files_that_it_includes_are_checked_too(tmp_path: Path, way: str) -> None:
    (tmp_path / "group").mkdir()
    for folder in (tmp_path, tmp_path / "group"):
        (folder / "part.yaml").write_text("# @package _global_\nhydra: {job: {chdir: true}}\n")
    (tmp_path / "it.yaml").write_text(f"defaults:\n  - {way}\n  - _self_\n")
    with pytest.raises(ConfigError, match=r"part\.yaml, line 2: Hydra's own settings"):
        check(tmp_path / "it.yaml")


def test_two_files_that_include_each_other_are_checked_once(tmp_path: Path) -> None:
    for name, other in ("ab", "ba"):
        (tmp_path / f"{name}.yaml").write_text(f"defaults: [{other}]\n")
    check(tmp_path / "a.yaml")


@pytest.mark.parametrize("defaults", ["[/run/smoke, _self_]", "[/run/smoke]", "[run/smoke]"])
def test_a_file_builds_on_a_run_file(tmp_path: Path, defaults: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"defaults: {defaults}\nname: mine\noptimizer: {{lr: 5e-3}}\n", encoding="utf-8-sig")
    with composed(file, []) as found:
        mapping = plain(found, file)
    with composed(CONFIGS / "run" / "smoke.yaml", []) as smoke:
        wanted = plain(smoke, file)
    assert (mapping["name"], mapping["optimizer"]["lr"]) == ("mine", 5e-3)
    wanted |= {"name": "mine", "optimizer": wanted["optimizer"] | {"lr": 5e-3}}
    assert mapping == wanted


@given(st.binary(max_size=60) | st.text("ab:{}[]&*!|>-\n \t'\"#%@`?,0123é", max_size=60).map(str.encode))
def test_any_content_is_taken_or_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.mktemp("any") / "it.yaml"
    file.write_bytes(content)
    message = ""
    try:
        check(file)
    except UserError as error:
        message = str(error)
    assert "\n" not in message
