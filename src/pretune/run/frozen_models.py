"""The frozen model beside the one in training: the reference model of preferences, or the teacher of a distillation."""

from __future__ import annotations

from pretune.objectives.config import DistillationConfig
from pretune.run.config import RunConfig
from pretune.run.parts import Parts
from pretune.run.reference_model import with_reference
from pretune.run.teacher import with_teacher


def with_frozen(config: RunConfig, parts: Parts, validation_only: bool = False) -> Parts:
    """`parts` with the frozen model that the run's objective compares with, or with what it says of the data, or for
    tasks that train nothing of the validation data; unchanged if the objective needs none."""
    objective = config.stage.objective
    if not objective.needs_reference:
        return parts
    add = with_teacher if isinstance(objective, DistillationConfig) else with_reference
    return add(config, parts, validation_only)
