"""Options of a group work with any options of the groups within it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from pretune.core.config import ConfigError, validate
from pretune.data.config import DataConfig
from pretune.launch.compose import composed
from pretune.launch.groups import CONFIGS, groups, options

INNER = {
    "data/source": "data.source",
    "data/source@data.validation.source": "data.validation.source",
    "data/format": "data.format",
    "data/tokenizer": "data.tokenizer",
    "data/mix": "data.mix",
}
"""The groups within `data`, and the sections that they fill."""


def complaint(data: dict[str, Any]) -> str | None:
    """Why a data section is refused, if it is."""
    try:
        validate(DataConfig, data)
    except ConfigError as error:
        return str(error)
    return None


def keys_of(value: Any, prefix: str) -> set[str]:
    """The dotted paths of all mappings and values in a YAML file."""
    if not isinstance(value, dict):
        return {prefix}
    return {prefix}.union(*(keys_of(inner, f"{prefix}.{key}") for key, inner in value.items()))


def test_no_preset_sets_a_key_within_a_section_that_has_options_of_its_own() -> None:
    presets = [*(CONFIGS / "data").glob("*.yaml"), *(CONFIGS / "data" / "common").glob("*.yaml")]
    assert len(presets) > 10
    for preset in presets:
        body = {
            key: value for key, value in OmegaConf.to_container(OmegaConf.load(preset)).items() if key != "defaults"
        }
        within = {key for key in keys_of(body, "data") for section in INNER.values() if key.startswith(f"{section}.")}
        assert not within, f"{preset.name} sets {within}: give the group of that section an option for it"


@pytest.mark.parametrize(
    "preset", ["python_docs_small", *(pytest.param(name, marks=pytest.mark.slow) for name in options("data"))]
)
def test_a_preset_works_with_all_options_of_the_groups_within_it(preset: str, tmp_path: Path) -> None:
    assert {name.partition("@")[0] for name in INNER} == {name for name in groups() if name.startswith("data/")}
    file = tmp_path / "own.yaml"
    file.write_text(f"defaults:\n  - /data: {preset}\n  - _self_\nmodel: {{vocab_size: 512}}\n")
    choices = {group: options(group.partition("@")[0]) for group in INNER}
    for number in range(max(map(len, choices.values()))):
        # Groups do not read each other's sections, so that the n-th options of all can be tried at once.
        words = [f"{group}={names[number % len(names)]}" for group, names in choices.items()]
        with composed(file, [*words, "data.validation.fraction=null"]) as config:
            for key in OmegaConf.missing_keys(config):
                OmegaConf.update(config, key, ["a.jsonl"] if key.endswith("files") else "a")
            data: Any = OmegaConf.to_container(config.data, resolve=True)
        assert complaint(data) is None or re.search(r"packing\.mode|cannot be mixed", str(complaint(data))), words
