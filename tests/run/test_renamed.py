"""An old key name is rejected with its new name, wherever it appears."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pretune.core.config import ConfigError, field_paths, validate
from pretune.launch import compose
from pretune.launch.groups import CONFIGS
from pretune.run.config import RunConfig

LEAVES = [key for key in RunConfig.renamed if "." in key or key != "averaging"]


@pytest.mark.parametrize("old", LEAVES)
def test_on_the_command_line(old: str) -> None:
    new = RunConfig.renamed[old]
    with (
        pytest.raises(ConfigError, match=f"^'{old}' was renamed to '{new}'$"),
        compose.composed(CONFIGS / "base.yaml", ["name=x", f"{old}=1"]),
    ):
        pass


@pytest.mark.parametrize("old", RunConfig.renamed)
def test_in_a_file(old: str, composed: Callable[..., dict[str, Any]]) -> None:
    mapping = composed("smoke")
    *outer, last = old.split(".")
    section = mapping
    for key in outer:
        section = section.setdefault(key, {})
    section[last] = 1
    expected = f"'{'averaging' if old.startswith('averaging') else old}' was renamed to '"
    with pytest.raises(ConfigError, match=expected):
        validate(RunConfig, mapping)


def test_each_new_name_is_a_key() -> None:
    assert set(RunConfig.renamed.values()) <= {path for path, _ in field_paths(RunConfig)}
