"""libyaml's reader gives what OmegaConf's own gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pretune.core.yaml_file import read_yaml

CONFIGS = Path(__file__).parents[2] / "src" / "config"
VALUES = (
    *(
        [
            "1e-3",
            "1E5",
            ".5",
            "-1.",
            "1_000",
            "0x1F",
            "010",
            "1:30",
            "2026-12-01",
            "yes",
            "off",
            "~",
            "null",
            ".inf",
            "-.nan",
            "text",
            "[1,x]",
        ]
    ),
    "'a: b'",
    '"\u00e9\n"',
    "{a: 1e3}",
)


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_files(file: Path) -> None:
    if "${" not in file.read_text():  # Hydra's resolvers are not there
        assert read_yaml(file) == OmegaConf.to_container(OmegaConf.load(file))


@pytest.mark.parametrize("value", VALUES)
def test_every_kind_of_value(value: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"key: {value}\n", encoding="utf-8")
    found, expected = read_yaml(tmp_path / "a.yaml"), OmegaConf.to_container(OmegaConf.load(tmp_path / "a.yaml"))
    assert repr(found) == repr(expected)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
@settings(max_examples=50, deadline=None)
def test_what_was_written(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.mktemp("yaml") / "a.yaml"
    path.write_text(yaml.safe_dump({"key": value}, allow_unicode=True), encoding="utf-8")
    if "${" not in path.read_text(encoding="utf-8"):
        assert read_yaml(path) == {"key": value}


def test_references_are_resolved_and_text_that_looks_like_one_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 3\nb: ${a}\nc: \\${a}\n")
    assert read_yaml(tmp_path / "a.yaml") == {"a": 3, "b": 3, "c": "${a}"}


@pytest.mark.parametrize("text", ["a: 1\na: 2\n", "a: [1\n", "a: \x07\n"])
def test_what_is_not_yaml(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(yaml.YAMLError):
        read_yaml(tmp_path / "a.yaml")
