"""Damaged and mistaken configurations are taken, or refused in lines that a user can act on; no traceback, no hang."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretune.core.config import UserError, validate
from pretune.launch.compose import composed, plain
from pretune.launch.groups import CONFIGS
from pretune.launch.overrides import readable
from pretune.run.config import RunConfig

WORDS = st.sampled_from([
    "", "~", "null", "???", "${name}", "${nothing}", "${oc.env:NOTHING_LIKE_IT}", "${", "\\${", "}", "é", "a/b", "-1",
    "0", "1e400", "0x10", "1_000", "010", ".5", "inf", "nan", "true", "yes", "3h", "hydra", "defaults", "_target_",
    "kind", "none", "a\nb", "\t", "'", '"', "*x", "&x", "!!int x", "- a", "a: b", "%", "@", "`", "#", "x" * 300,
])  # fmt: skip
SCALARS = WORDS | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=4
)


@pytest.fixture(scope="module")
def resolved() -> dict[str, Any]:
    file = CONFIGS / "run" / "smoke.yaml"
    with composed(file, []) as config:
        return plain(config, file)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside another."""
    keys: Any = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [one for key in keys for one in [(*path, key), *places(value[key], (*path, key))]]


def damage(data: st.DataObject, mapping: dict[str, Any]) -> dict[str, Any]:
    """The mapping with one to three values replaced, removed or added."""
    damaged = copy.deepcopy(mapping)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(damaged) or [("x",)]))
        outer: Any = damaged
        for key in path[:-1]:
            outer = outer[key]
        match data.draw(st.sampled_from(["replace", "remove", "add", "rename"])):
            case "replace":
                outer[path[-1]] = data.draw(VALUES)
            case "remove" if isinstance(outer, dict):
                outer.pop(path[-1], None)
            case "add" if isinstance(outer, dict):
                outer[data.draw(WORDS)] = data.draw(VALUES)
            case "rename" if isinstance(outer, dict) and path[-1] in outer:
                outer[data.draw(WORDS)] = outer.pop(path[-1])
    return damaged


def check(file: Path, words: list[str]) -> None:
    message = "taken"
    try:
        with composed(file, readable(words, False)) as config:
            mapping = plain(config, file)
        validate(RunConfig, mapping)
    except UserError as error:
        message = str(error)
    # One line per fault, and the first one says something.
    assert message.splitlines()[0].strip()
    assert message.count("\n") <= 12


def fuzz(data: st.DataObject, folder: Path, mapping: dict[str, Any]) -> None:
    file = folder / "it.yaml"
    text = yaml.safe_dump(damage(data, mapping), sort_keys=False, allow_unicode=True)
    if data.draw(st.booleans()):  # bytes that a disk or an editor lost
        content, at = bytearray(text.encode("utf-8", "replace")), data.draw(st.integers(0, 10**6))
        content[at % len(content)] = data.draw(st.integers(0, 255))
        file.write_bytes(
            content[: data.draw(st.integers(1, 10**6)) % len(content) + 1] if data.draw(st.booleans()) else content
        )
    else:
        file.write_text(text, encoding="utf-8", errors="replace")
    words = data.draw(st.lists(st.tuples(st.sampled_from(places(mapping)), WORDS), max_size=1))
    check(file, [f"{'.'.join(map(str, path))}={word}" for path, word in words])


@given(st.data())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_a_damaged_configuration(tmp_path: Path, resolved: dict[str, Any], data: st.DataObject) -> None:
    fuzz(data, tmp_path, resolved)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=2000, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_2000_damaged_configurations(tmp_path: Path, resolved: dict[str, Any], data: st.DataObject) -> None:
    fuzz(data, tmp_path, resolved)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_200_damaged_run_files(tmp_path: Path, data: st.DataObject) -> None:
    """As people write them, with a defaults list that may be damaged too."""
    names = sorted(path.stem for path in (CONFIGS / "run").glob("*.yaml"))
    text = (CONFIGS / "run" / f"{data.draw(st.sampled_from(names))}.yaml").read_text()
    fuzz(data, tmp_path, yaml.safe_load(text))
