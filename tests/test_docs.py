"""The files generated from the configuration's types are current, complete, and consistent with the run files."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from jsonschema.validators import validator_for
from omegaconf import OmegaConf

from pretune.core.config import field_paths
from pretune.run.config import RunConfig

ROOT = Path(__file__).parent.parent
RUN_FILES = sorted((ROOT / "src" / "config" / "run").glob("*.yaml"))


@pytest.fixture(scope="module")
def generator() -> types.ModuleType:
    """docs/generate.py, which is a script, not a package."""
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(generator: types.ModuleType) -> str:
    """docs/reference.md as it should be: every option of every group is composed for it."""
    return generator.reference_text()


@pytest.fixture(scope="module")
def schema(generator: types.ModuleType) -> Any:
    """A validator: checking that the schema itself is one takes a second, so it is done once."""
    text = json.loads(generator.schema_text())
    validator = validator_for(text)
    validator.check_schema(text)
    return validator(text)


def read(path: Path) -> Any:
    """A YAML file as an editor sees it: interpolations are strings."""
    return OmegaConf.to_container(OmegaConf.load(path))


def test_what_is_committed_is_current(generator: types.ModuleType, page: str) -> None:
    assert generator.SCHEMA.read_text() == generator.schema_text(), "run `make schema`"
    assert generator.REFERENCE.read_text() == page, "run `make schema`"


def test_every_key_has_a_sentence() -> None:
    silent = [path for path, field in field_paths(RunConfig) if not (field.description or "").strip()]
    assert silent == []


def test_the_reference_has_every_key(page: str) -> None:
    headings = set(re.findall(r"^##+ ([\w.]+)", page, re.MULTILINE))
    keys = set(re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE)) | headings
    # The headings show the kinds of a union.
    kinds = {f"{path}.kind" for path in re.findall(r"^### ([\w.]+), kind", page, re.MULTILINE)}
    assert {path for path, _ in field_paths(RunConfig)} <= keys | kinds


def test_the_reference_gives_type_range_and_value(page: str) -> None:
    assert re.search(r"`optimizer\.betas` \| list of 2: float ≥ 0, < 1 \| `\[0\.9, 0\.95\]` \|", page)
    assert re.search(r"`budget\.time` \| time > 0 s or null \| `null` \|", page)
    assert re.search(r"`name` \| text \| open \|", page)


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_run_files_agree_with_the_schema_they_name(path: Path, schema: Any) -> None:
    named = re.search(r"^# yaml-language-server: \$schema=(\S+)\n", path.read_text(), re.MULTILINE)
    assert named, "a comment names the schema for editors"
    assert (path.parent / named[1]).resolve() == ROOT / "src" / "config" / "schema.json"
    schema.validate(read(path))


def test_the_schema_accepts_what_people_write(schema: Any) -> None:
    for text in (
        "{}",
        "{name: x, budget: {time: 1h30m}, optimizer: {lr: 3e-4}, schedule: {warmup: 0.1}}",
        "{batch: {tokens: '${data.sequence_length}'}, data: {source: {files: ['${oc.env:HOME}/x', y]}}}",
        "{model: '${other}', name: '???', budget: {time: 300, steps: null}}",
        "{defaults: [/base, {override /model: nano}, _self_]}",
        "{optimizer: {kind: lion, betas: [0.9, 0.99]}}",
    ):
        schema.validate(OmegaConf.to_container(OmegaConf.create(text)))


@pytest.mark.parametrize(
    "text",
    [
        "{optimiser: {lr: 1e-3}}",
        "{optimizer: {lrr: 1e-3}}",
        "{optimizer: {lr: -1}}",
        "{optimizer: {kind: lion, eps: 1e-8}}",
        "{budget: {steps: 1.5}}",
        "{budget: {time: soon}}",
        "{task: trian}",
        "{data: {format: {kind: poem}}}",
    ],
)
def test_the_schema_marks_mistakes(text: str, schema: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        schema.validate(OmegaConf.to_container(OmegaConf.create(text)))


def test_editors_are_told_what_a_key_is(schema: Any) -> None:
    assert schema.schema["properties"]["seed"]["description"] == RunConfig.model_fields["seed"].description
    assert "required" not in json.dumps(schema.schema)


def test_the_site_builds_and_asks_nothing_of_other_hosts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        remote = re.findall(
            r"<(?:script|img|iframe)[^>]+src=\"(https?:[^\"]+)|<link rel=\"stylesheet\"[^>]+href=\"(https?:[^\"]+)",
            page.read_text(),
        )
        assert remote == [], page


def test_pages_link_only_to_what_exists() -> None:
    # mkdocs --strict checks docs/; these pages are read beside the code.
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            assert target.startswith(("https:", "http:")) or (page.parent / target).exists(), f"{page.name}: {target}"
