"""Which of several processes this one is, if torchrun or srun started it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launched:
    """Ranks count from 0; local ones are those of this machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1


def launched(environment: Mapping[str, str] = os.environ) -> Launched:
    """What the environment says; one process alone where it says nothing."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    values = [environment.get(name, "") for name in names]
    return Launched(*map(int, values)) if all(value.isdigit() for value in values) else Launched()


def adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """Set the variables that torchrun would, in a process that srun started as one of several. In a job's script
    itself, which runs once, nothing is set."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or not tasks.isdigit() or int(tasks) < 2:
        return
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", tasks)
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": re.split(r"[(,]", per_node)[0],
        "MASTER_ADDR": _first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(20_000 + int(environment["SLURM_JOB_ID"]) % 20_000),
    }
    environment.update({name: value for name, value in found.items() if name not in environment})


def _first_host(nodes: str) -> str:
    """The first of `gpu[07-09,12],cpu1`: gpu07."""
    found = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
    assert found is not None, nodes
    return found[1] + (found[2] or "")
