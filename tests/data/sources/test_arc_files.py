"""Tasks of ARC in every layout of their files, and what is wrong with a file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from small_data import data_config

from pretune.core.config import ConfigError, InputError, validate
from pretune.data.sources.config import ArcSource
from pretune.data.sources.rows import check_apart, identity, rows

PAIR = {"input": [[0, 1]], "output": [[1, 0]]}
ONE = {"train": [PAIR, PAIR], "test": [PAIR]}
TWO = {"train": [PAIR], "test": [{"input": [[2]]}, {"input": [[3]]}]}


def source(*files: Path, solutions: Path | None = None) -> ArcSource:
    section: dict[str, Any] = {"kind": "arc", "files": [str(file) for file in files]}
    return validate(ArcSource, section | {"solutions": solutions and str(solutions)})


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_folder_has_a_task_in_each_file(tmp_path: Path) -> None:
    write(tmp_path / "all" / "b2.json", TWO)
    write(tmp_path / "all" / "a1.json", ONE)
    write(tmp_path / "all" / "notes.txt", "no task")
    found = list(rows(source(tmp_path / "all")))
    assert found == [{"id": "a1", **ONE}, {"id": "b2", **TWO}]
    assert list(rows(source(tmp_path / "all" / "*2.json"))) == found[1:]


def test_a_file_has_tasks_by_their_ids_and_another_their_outputs(tmp_path: Path) -> None:
    tasks = write(tmp_path / "challenges.json", {"a1": ONE, "b2": TWO})
    solutions = write(tmp_path / "solutions.json", {"a1": [[[9]]], "b2": [[[5]], [[6, 6]]]})
    first, second = rows(source(tasks, solutions=solutions))
    assert first["test"] == [{"input": [[0, 1]], "output": [[9]]}]
    assert second["test"] == [{"input": [[2]], "output": [[5]]}, {"input": [[3]], "output": [[6, 6]]}]
    assert list(rows(source(tasks))) == [{"id": "a1", **ONE}, {"id": "b2", **TWO}]
    packed = tmp_path / "challenges.json.gz"
    packed.write_bytes(gzip.compress(tasks.read_bytes()))
    assert list(rows(source(packed))) == list(rows(source(tasks)))


@pytest.mark.parametrize(("content", "fault"), [
    ("{", r"line 1, column 2 is not JSON"),
    ([ONE], "is no JSON object"),
    ({"a1": ONE, "b2": {"train": []}}, "'b2' is no task"),
    ({"train": 3}, "'train' is no task"),
])  # fmt: skip
def test_what_is_no_task_is_an_error(content: Any, fault: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=fault):
        list(rows(source(write(tmp_path / "a.json", content))))


def test_solutions_of_other_tasks_are_an_error(tmp_path: Path) -> None:
    tasks = write(tmp_path / "tasks.json", {"b2": TWO})
    for solutions, fault in (({"b2": [[[5]]]}, "1 outputs for 2 tests"), ({"b2": 3}, "no list of outputs")):
        with pytest.raises(InputError, match=f"task b2: {fault}"):
            list(rows(source(tasks, solutions=write(tmp_path / "solutions.json", solutions))))


def test_places_without_tasks_are_errors(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no \.json files"):
        list(rows(source(tmp_path / "empty")))
    with pytest.raises(InputError, match="no file matches"):
        list(rows(source(tmp_path / "none.json")))


def test_tasks_are_known_by_content_and_name_wherever_they_are(tmp_path: Path) -> None:
    for folder, name in (("one", "a"), ("two", "a"), ("three", "b")):
        write(tmp_path / folder / f"{name}.json", ONE)
    first, moved, renamed = (identity(source(tmp_path / name), tmp_path / "c") for name in ("one", "two", "three"))
    assert first == moved != renamed
    solved = source(tmp_path / "one", solutions=write(tmp_path / "solutions.json", {}))
    assert identity(solved, tmp_path / "c") != first


def test_a_file_on_both_sides_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "all" / "a.json", ONE)
    write(tmp_path / "all" / "b.json", TWO)
    both = source(tmp_path / "all"), source(tmp_path / "all" / "b.json")
    train, held_out = (one.model_dump(mode="json") for one in both)
    config = data_config(source=train, validation={"source": held_out, "fraction": None})
    with pytest.raises(ConfigError, match=r"b\.json.* measured on what it was trained on"):
        check_apart(config)
