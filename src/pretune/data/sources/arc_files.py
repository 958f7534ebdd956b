"""Tasks of the Abstraction and Reasoning Corpus: a folder with a file for each, or files with many by their ids.

A row is {id, train, test}; `train` and `test` are lists of pairs {input, output} of grids, which are lists of rows of
numbers. A competition's outputs of tests are in a file of their own, which `solutions` names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pretune.core.config import InputError
from pretune.data.sources.config import ArcSource
from pretune.data.sources.data_file import DataFile
from pretune.data.sources.local_files import expand


def rows(config: ArcSource) -> Iterator[dict[str, Any]]:
    """The tasks of all files, in the order of these, and of each file.

    Raises InputError for what is no JSON, holds no tasks, or has solutions that do not fit the tests.
    """
    solutions = None if config.solutions is None else _object(Path(config.solutions))
    for file in task_files(config):
        for name, task in _tasks(file):
            row = {"id": name, "train": task["train"], "test": task["test"]}
            if solutions is not None and name in solutions:
                row["test"] = _solved(task["test"], solutions[name], f"{config.solutions}, task {name}")
            yield row


def task_files(config: ArcSource) -> list[Path]:
    """The files with tasks; a folder stands for its .json files, by their names."""
    found: list[Path] = []
    for pattern in config.files:
        if Path(pattern).is_dir():
            inside = sorted(Path(pattern).glob("*.json"))
            if not inside:
                raise InputError(f"the folder '{pattern}' has no .json files; correct data.source.files")
            found += inside
        else:
            found += expand((pattern,))
    return found


def _tasks(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The tasks of a file, each with its id: that in the file, or the file's name for a file with a single task."""
    content = _object(file)
    tasks = {file.name.partition(".")[0]: content} if _is_task(content) else content
    for name, task in tasks.items():
        if not _is_task(task):
            raise InputError(
                f"{file}: '{name}' is no task: a task is an object with the lists train and test of pairs "
                "{input, output}"
            )
        yield name, task


def _is_task(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(key), list) for key in ("train", "test"))


def _solved(test: list[Any], outputs: Any, place: str) -> list[Any]:
    if not isinstance(outputs, list) or len(outputs) != len(test):
        count = len(outputs) if isinstance(outputs, list) else "no list of"
        raise InputError(f"{place}: {count} outputs for {len(test)} tests; data.source.solutions is of other tasks")
    pairs = zip(test, outputs, strict=True)
    return [{**pair, "output": output} if isinstance(pair, Mapping) else pair for pair, output in pairs]


def _object(file: Path) -> dict[str, Any]:
    with DataFile.local(file).text(newline=None) as text:
        try:
            content = json.load(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{file} line {error.lineno}, column {error.colno} is not JSON: {error.msg}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} is no JSON object: it must be a task, or hold tasks by their ids")
    return content
