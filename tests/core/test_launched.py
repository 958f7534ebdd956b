"""Which process this one is, by what torchrun and srun leave in the environment."""

from __future__ import annotations

from pretune.core.launched import Launched, adopt_slurm, launched


def test_a_process_alone() -> None:
    assert launched({}) == Launched(0, 1, 0, 1)
    assert launched({"RANK": "1"}) == Launched(0, 1, 0, 1), "another program's variable"


def test_torchrun() -> None:
    found = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert launched(found) == Launched(5, 8, 1, 4)


def test_srun_starts_several_tasks() -> None:
    step = {
        "SLURM_JOB_ID": "123456", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "gpu[07-08]",
    }  # fmt: skip
    adopt_slurm(step)
    assert launched(step) == Launched(3, 4, 1, 2)
    assert step["MASTER_ADDR"] == "gpu07"
    assert 20_000 <= int(step["MASTER_PORT"]) < 40_000


def test_the_script_of_a_job_is_one_process() -> None:
    batch = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    before = dict(batch)
    adopt_slurm(batch)
    assert batch == before


def test_the_first_host_of_a_list() -> None:
    for nodes, first in {"n1": "n1", "n1,n2": "n1", "gpu[3,7]": "gpu3", "a-b[001-004],c": "a-b001"}.items():
        step = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
        step["SLURM_STEP_NODELIST"] = nodes
        adopt_slurm(step)
        assert step["MASTER_ADDR"] == first
