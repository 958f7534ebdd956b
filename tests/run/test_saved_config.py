"""A run's saved configuration is the resolved one, character for character."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretune.launch.compose import composed, plain
from pretune.run.folder import read_config, write_config

TEXT = st.text(st.sampled_from("\\${}ab: '\"\n~#é") | st.characters(exclude_categories=["Cs"]))


@given(st.dictionaries(st.sampled_from("abc"), TEXT | st.lists(TEXT) | st.dictionaries(st.just("d"), TEXT)))
def test_any_text_is_saved_as_it_is(tmp_path_factory: pytest.TempPathFactory, mapping: dict[str, Any]) -> None:
    file = tmp_path_factory.mktemp("run") / "config.yaml"
    write_config(file, mapping)
    assert read_config(file) == mapping


@settings(max_examples=30)
@given(TEXT.filter(lambda text: text != "???"))
def test_it_is_composed_as_it_was_however_often_it_is_saved(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    file = tmp_path_factory.mktemp("run") / "config.yaml"
    mapping: dict[str, Any] = {"name": "x", "samples": {"prompts": ["echo ${HOME} \\${name}", text]}}
    for _ in range(2):
        write_config(file, mapping)
        with composed(file, []) as config:
            assert plain(config, file) == mapping


def test_the_home_folder_is_expanded_wherever_a_path_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from pretune.core.config import field_paths, validate
    from pretune.data.sources.config import FilesSource
    from pretune.run.config import RunConfig

    monkeypatch.setenv("HOME", str(tmp_path))
    section = validate(FilesSource, {"kind": "files", "files": ["~/a.txt", "b~"], "format": "auto", "max_rows": None})
    assert section.files == (str(tmp_path / "a.txt"), "b~")
    paths = {path for path, field in field_paths(RunConfig) if "AfterValidator" in repr(field)}
    assert paths >= {
        "output_dir", "stage.init_from", "adapter.init_from", "data.tokenizer.path", "data.source.files",
        "budget.replay", "generate.file", "generate.output", "generate.export", "export.output", "report.runs",
        "plan.file",
    }  # fmt: skip
