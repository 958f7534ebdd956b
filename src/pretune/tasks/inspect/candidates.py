"""Find the models that task=inspect compares: runs, folders, models on the hub, and shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretune.core.config import InputError, validate
from pretune.model.config import ModelConfig
from pretune.run.folder import RunFolder, find_run
from pretune.run.pretrained import PretrainedModel, find_pretrained, why_no_model
from pretune.run.weights import chosen_checkpoint

SHAPE = "model="

Compose = Callable[[str | None, Sequence[str]], dict[str, Any]]
"""The plain mapping of a run file with the overrides of the command line and more; for None, that of what ships with
Pretune, with these alone."""


@dataclass(frozen=True)
class Candidate:
    """A model to choose, by the name that the user gave it."""

    name: str
    source: RunFolder | PretrainedModel | ModelConfig

    @property
    def kind(self) -> str:
        """`run`, `folder`, `hub` or `shape`."""
        match self.source:
            case RunFolder():
                return "run"
            case PretrainedModel():
                return "folder" if repository(self.source)[0] is None else "hub"
            case _:
                return "shape"

    def overrides(self) -> list[str]:
        """What makes a run file train this model. A run without a checkpoint raises InputError."""
        match self.source:
            case RunFolder():
                start = str(chosen_checkpoint(self.source))
            case PretrainedModel():
                start = self.source.name
            case _:
                return [self.name, "stage.init_from=null"]
        return ["model=auto", f"stage.init_from={start}"]


def find(name: str, runs: str, compose: Compose) -> Candidate:
    """The candidate of that name; of a model on the hub only small files are downloaded, no weights.

    Raises InputError or ConfigError, saying why, if there is none.
    """
    if name.startswith(SHAPE):
        return Candidate(name, validate(ModelConfig, compose(None, [name])["model"]))
    try:
        return Candidate(name, find_run(name, runs))
    except InputError:
        found = find_pretrained(name, "about")
    if found is None:
        hint = f"neither a run in {runs}, nor a folder, nor owner/name on the hub"
        raise InputError(why_no_model(name) or hint)
    return Candidate(name, found)


def repository(model: PretrainedModel) -> tuple[str | None, str | None]:
    """The repository and the commit of a model on the hub; None and None for a folder."""
    if Path(model.name) == model.path:
        return None, None
    owner_and_name, _, commit = model.name.partition("@")
    return owner_and_name, commit
