"""task=plan of several devices: against published runs, against itself, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretune.compute.interconnects import LINKS
from pretune.core.config import ConfigError, validate
from pretune.dispatch import run
from pretune.memory.sharded import shared_out
from pretune.parallel.traffic import Sizes, of_fsdp
from pretune.run.config import RunConfig
from pretune.tasks.plan.estimate import Plan, make_plan
from pretune.tasks.plan.scaling import waiting

Compose = Callable[..., dict[str, Any]]
EAGER = ("optimizer=adamw", "precision=bf16", "precision.compile=false", "plan.device=a100-40gb")


def plan_of(composed: Compose, *overrides: str) -> Plan:
    return make_plan(validate(RunConfig, composed("quickstart_pretrain", *EAGER, *overrides)))


@pytest.mark.parametrize(("tokens_per_second", "published"), [(6667, 6514 / 6667), (5762, 5605 / 5762)])
def test_a_published_run_scaled_nearly_as_predicted(tokens_per_second: float, published: float) -> None:
    """torchtitan (benchmarks/llama3_h100_202412_torchtitan.md): Llama 3.1 8B with FSDP2, 2 sequences of 8,192 tokens on
    each H100, weights gathered in bfloat16; 6,667 tokens/s of each of 8 and 6,514 of each of 128 (uncompiled: 5,762 and
    5,605), with 400 Gbit/s for each device between machines."""
    outside, blocks = 2 * 128_256 * 4096, 32 * 218_112_000
    sizes = Sizes(2 * outside, 2 * blocks, 32, 4 * outside, 4 * blocks, 0)
    passes = 2 * 8192 / tokens_per_second

    def step(devices: int, link: str) -> float:
        return passes + waiting(of_fsdp(sizes, devices, 1, True), LINKS[link], passes, 1)

    predicted = step(8, "nvlink4") / step(128, "ib400")
    assert published < predicted < published + 0.03, "nothing but traffic is predicted: stragglers come on top"


def test_a_slow_network_is_what_a_step_waits_for(composed: Compose) -> None:
    plans = {
        link: plan_of(composed, "plan.devices=4", f"plan.interconnect={link}").scaling
        for link in ("nvlink3", "eth100", "eth10")
    }
    found = {link: scaling.planned for link, scaling in plans.items() if scaling is not None}
    assert len(found) == 3
    assert found["nvlink3"].efficiency > found["eth100"].efficiency > found["eth10"].efficiency
    # Gradients of 4 bytes for each parameter, three quarters of them twice.
    sent = 2 * 3 / 4 * 4 * sum(plan_of(composed).parameters.values())
    assert found["eth10"].sent == pytest.approx(sent, rel=1e-3)
    assert found["eth10"].waits == pytest.approx(sent / 1e9, rel=0.5)


def test_all_figures_are_for_all_devices(composed: Compose, tmp_path: Path) -> None:
    budget = ("budget={tokens: 4194304, time: null}", "plan.interconnect=nvlink3")
    one, four = plan_of(composed, *budget), plan_of(composed, *budget, "plan.devices=4")
    assert one.scaling is None
    assert four.scaling is not None
    assert four.steps == one.steps
    assert four.tokens_per_second == four.scaling.planned.tokens_per_second
    assert four.seconds == pytest.approx(one.seconds / 4 / four.scaling.planned.efficiency)
    assert [scaled.devices for scaled in four.scaling.others][:3] == [1, 2, 4]
    assert four.scaling.others[0].efficiency == 1
    assert four.memory == four.scaling.memory
    file = tmp_path / "plan.json"
    assert (
        run(
            composed(
                "quickstart_pretrain",
                "task=plan",
                *EAGER,
                *budget,
                "plan.devices=4",
                f"plan.file={file}",
                f"output_dir={tmp_path}",
            )
        )
        == 0
    )
    assert json.loads(file.read_text())["scaling"]["planned"]["devices"] == 4


def test_shared_parameters_take_a_share_of_the_memory(composed: Compose) -> None:
    whole = plan_of(composed, "plan.devices=4", "parallel=ddp")
    shared = plan_of(composed, "plan.devices=4", "parallel=fsdp")
    kept = plan_of(composed, "plan.devices=4", "parallel=fsdp", "parallel.reshard_after_forward=false")
    assert shared.scaling is not None
    assert shared.scaling.planned.kind == "fsdp"
    for part in ("weights", "optimizer"):
        assert shared.memory[part] == pytest.approx(whole.memory[part] / 4, abs=4)
    assert kept.memory["gathered weights"] > shared.memory["gathered weights"]
    replicas = plan_of(composed, "plan.devices=4", "parallel=fsdp", "parallel.mesh=[2,2]")
    assert replicas.memory["weights"] == pytest.approx(whole.memory["weights"] / 2, abs=4)


def test_what_is_gathered_is_outside_the_blocks_and_two_of_them() -> None:
    sizes = Sizes(1000, 8000, 8, 1000, 8000, 0)
    found = shared_out({"weights": 9000, "gradients": 9000, "optimizer": 18_000, "activations": 70}, sizes, 3, True)
    assert found == {
        "gathered weights": 1000 + 2000 + 1000 + 1000,
        "weights": 3000,
        "gradients": 3000,
        "optimizer": 6000,
        "activations": 70,
    }


def test_a_model_that_fits_no_device_is_shared_out(composed: Compose) -> None:
    wide = ("model.dim=8192", "model.num_layers=4", "model.mlp_dim=32768", "model.num_heads=64", "batch.micro_batch=1",
            "model.num_kv_heads=64", "model.head_dim=128")  # fmt: skip
    found = plan_of(composed, *wide, "plan.devices=8").scaling
    assert found is not None
    assert found.planned.kind == "fsdp"
    assert found.others[0].memory is None, "one device has no room for it"
    assert found.planned.memory is not None


def test_devices_that_cannot_share_a_step_are_refused(composed: Compose) -> None:
    with pytest.raises(ConfigError, match=r"7 devices \(plan.devices\) cannot share out equally: set plan.devices=8"):
        plan_of(composed, "plan.devices=7", "batch.tokens=8192", "data.sequence_length=256")
