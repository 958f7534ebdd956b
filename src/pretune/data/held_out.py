"""What is asked of a model on held-out rows: problems with options, questions with answers, and tasks of grids.

They are prepared once, in the cache beside the shards and checked like these, so that neither an evaluation nor a
resume reads the source again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pretune.core.files import atomic_folder, fingerprint
from pretune.core.terminal import warn
from pretune.data.config import DataConfig
from pretune.data.formats.build import build_formatter
from pretune.data.formats.documents import problems, questions, tasks
from pretune.data.formats.formatter import VERSION as FORMATS_VERSION
from pretune.data.formats.formatter import Formatter
from pretune.data.formats.grids import GridTask, Pair, checked
from pretune.data.formats.problems import Problem, Question
from pretune.data.formats.segments import Segment
from pretune.data.formats.special_tokens import TemplateTokens
from pretune.data.formats.template_source import rendered_by
from pretune.data.shard_files import (
    discard,
    filling,
    find_shards,
    shard_folder,
    write_complete,
    write_shard_record,
)
from pretune.data.sources.rows import Split, identity, side_source

VERSION = 1
"""Increment when the layout on disk changes."""

_THREADS = 2
"""That check the files."""


@dataclass(frozen=True)
class HeldOut:
    """Prepared problems, questions and tasks, in the order of their source, in a folder of the cache."""

    folder: Path

    def problems(self, limit: int | None) -> Iterator[Problem]:
        """The first `limit` multiple-choice problems."""
        for one in self._read("problems", limit):
            yield Problem(one["prompt"], tuple(one["options"]), one["correct"], one["closing"])

    def questions(self, limit: int | None) -> Iterator[Question]:
        """The first `limit` questions whose generated answers can be checked."""
        for one in self._read("questions", limit):
            yield Question([Segment(**part) for part in one["prompt"]], one["wanted"], tuple(one["options"]))

    def tasks(self, limit: int | None) -> Iterator[GridTask]:
        """The first `limit` tasks of grids."""
        for one in self._read("tasks", limit):
            train, test = (tuple(_pair(pair) for pair in one[side]) for side in ("train", "test"))
            yield GridTask(one["name"], train, test)

    def _read(self, kind: str, limit: int | None) -> Iterator[Any]:
        with (shard_folder(self.folder, 0) / f"{kind}.jsonl").open(encoding="utf-8") as lines:
            for line in islice(lines, limit):
                yield json.loads(line)


def _pair(stored: dict[str, Any]) -> Pair:
    output = stored["output"]
    return Pair(checked(stored["input"], "input"), None if output is None else checked(output, "output"))


def prepare_held_out(config: DataConfig, tokens: TemplateTokens, cache: Path) -> HeldOut | None:
    """Write what the format can ask of the held-out rows into `cache`, unless it is there already, whole; None for a
    format that can ask nothing. `tokens`: the tokenizer's, for its chat template.

    Raises InputError for a source that cannot be read, and for a cache that cannot be written.
    """
    kinds = _kinds(config)
    if not kinds:
        return None
    depends_on = {
        "version": [VERSION, FORMATS_VERSION],
        "source": identity(side_source(config, "validation"), cache),
        "format": config.format.model_dump(),
        "template": rendered_by(config.format, tokens),
        "held_out": None if config.validation.fraction is None else asdict(Split.of(config)),
    }
    folder = cache / f"problems-{fingerprint(depends_on)}"
    if not find_shards(folder, depends_on, _THREADS).complete:
        with filling(folder):
            found = find_shards(folder, depends_on, _THREADS)  # again: another process may have been at work
            if not found.complete:
                if found.fault is not None:
                    warn(f"prepared problems in {folder} are damaged ({found.fault}): they are prepared again")
                discard(folder, 0)
                _write(folder, kinds, config, build_formatter(config.format, tokens), depends_on)
    return HeldOut(folder)


Reader = Callable[[DataConfig, Formatter], Iterator[Any]]


def _kinds(config: DataConfig) -> dict[str, Reader]:
    """What the format can ask, with the function that reads it, by the name of its file."""
    found: dict[str, Reader] = {}
    if config.format.has_options:
        found["problems"] = problems
    if config.format.has_answers:
        found["questions"] = questions
    if config.format.has_tasks:
        found["tasks"] = tasks
    return found


def _write(
    folder: Path, kinds: dict[str, Reader], config: DataConfig, formatter: Formatter, depends_on: dict[str, Any]
) -> None:
    number = 0
    with atomic_folder(shard_folder(folder, 0)) as shard:
        for kind, read in kinds.items():
            with (shard / f"{kind}.jsonl").open("w", encoding="utf-8") as file:
                for number, one in enumerate(read(config, formatter), start=1):  # noqa: B007
                    file.write(json.dumps(asdict(one), ensure_ascii=False) + "\n")
        write_shard_record(shard, folder.name, {"start_row": 0, "stop_row": number})
    write_complete(folder, 1, number, depends_on)
