"""The YAML options of both groups match the sections."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from omegaconf import OmegaConf

from pretune.core.config import ConfigError, Section, validate
from pretune.optim.config import BudgetConfig, OptimizerConfig, ScheduleConfig, TrapezoidConfig

EMPTY = {"steps": None, "tokens": None, "time": None, "count": [], "replay": None}
CONFIG = Path(__file__).parents[2] / "src" / "config"


class Both(Section):
    optimizer: OptimizerConfig
    schedule: ScheduleConfig


def option(path: Path) -> dict:
    return OmegaConf.to_container(OmegaConf.load(path))  # type: ignore[return-value]


@pytest.mark.parametrize("group", ["optimizer", "schedule"])
def test_every_option_is_valid_and_every_kind_has_one(group: str):
    other = {"optimizer": "schedule/cosine", "schedule": "optimizer/adamw"}[group]
    kinds = set()
    for path in (CONFIG / group).glob("*.yaml"):
        section = {group: option(path), other.split("/")[0]: option(CONFIG / f"{other}.yaml")}
        assert getattr(validate(Both, section), group).kind == path.stem
        kinds.add(path.stem)
    union = get_args(Both.model_fields[group].annotation)
    assert kinds == {get_args(member.model_fields["kind"].annotation)[0] for member in union}


def test_a_trapezoid_larger_than_its_budget_is_refused():
    section = {"kind": "trapezoid", "warmup": 0.5, "decay": 0.6, "shape": "linear", "initial": 0.0, "final": 0.0}
    with pytest.raises(ConfigError, match=r"warmup \(0.5\) and decay \(0.6\) take more than the whole budget"):
        validate(TrapezoidConfig, section)


@pytest.mark.parametrize(
    ("time", "seconds"), [("3h", 10800.0), ("1h30m", 5400.0), ("3 hours", 10800.0), (90, 90.0), ("0.5m", 30.0)]
)
def test_times_are_read_with_their_units(time: object, seconds: float):
    assert validate(BudgetConfig, EMPTY | {"time": time}).time == seconds


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"time": "3x"}, "write seconds"),
        ({"time": "-3h"}, "write seconds"),
        ({"time": 0}, "greater than 0"),
        ({"time": "0s"}, "greater than 0"),
        ({"steps": 0}, "greater than or equal to 1"),
        ({"tokens": -5}, "greater than or equal to 1"),
        ({}, "the budget is empty"),
        ({"time": 5, "count": ["evaluations"]}, "count.*'evaluations'"),
    ],
)
def test_budgets_of_nothing_are_refused(budget: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        validate(BudgetConfig, EMPTY | budget)
