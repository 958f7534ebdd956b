"""What differs on other machines: a CPU without bfloat16, Apple's GPU, TensorFloat-32."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from operators import Operators
from tiny import tiny_model
from torch import Tensor

from pretune.compute.precision import set_tf32
from pretune.core.batch import Batch
from pretune.core.config import validate
from pretune.run.config import RunConfig
from pretune.run.precision import resolve

Compose = Callable[..., dict[str, Any]]
ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="holds back an x86 CPU")
def test_the_smoke_run_on_a_cpu_without_bfloat16(tmp_path: Path) -> None:
    """The run file as shipped, with AVX2 only, as on nearly every laptop."""
    held_back = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    settings = ["precision=auto", f"output_dir={tmp_path}", "budget.steps=10"]
    done = subprocess.run(
        [sys.executable, "src/main.py", "--config", "src/config/run/smoke.yaml", *settings],
        cwd=ROOT, env=os.environ | held_back | {"PRETUNE_CACHE": str(tmp_path / "cache")}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert " on cpu in fp32 (" in done.stdout
    summary = json.loads((tmp_path / "smoke" / "summary.json").read_text())
    assert summary["val/loss"] < 6.7
    assert 0 < summary["train/mfu"] <= 1


def doubles_elsewhere(tensor: Tensor) -> bool:
    """Whether this is a float64 tensor outside the CPU."""
    return tensor.dtype == torch.float64 and tensor.device.type != "cpu"


def test_no_float64_leaves_the_cpu() -> None:
    """Apple's GPU has no float64. The meta device stands in for it: tensors without values, on a separate device."""
    model, tokens = tiny_model(), torch.zeros(2, 8, dtype=torch.int64)
    with Operators(doubles_elsewhere) as doubles:
        model.to("meta").unembed(model(tokens.to("meta"))).float().sum().backward()
    assert doubles.found == set()
    assert model.rope.table.device.type == "meta"
    with Operators(doubles_elsewhere) as doubles:
        torch.zeros(2, device="meta").double()
    assert doubles.found, "the check can fail"


@pytest.mark.parametrize(("device", "expected"), [("mps", False), ("cpu", False), ("cuda", True)])
def test_only_copies_to_cuda_go_on_by_themselves(device: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def moved(tensor: Tensor, target: torch.device, non_blocking: bool) -> Tensor:
        asked.append((target.type, non_blocking))
        return tensor

    monkeypatch.setattr(Tensor, "to", moved)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    Batch(tokens, tokens, None).to(torch.device(device))
    assert asked == [(device, expected)] * 2


@pytest.mark.parametrize(("overrides", "expected"), [((), "highest"), (("precision=tf32",), "high")])
def test_tensor_float_32_is_what_is_asked_for(
    overrides: tuple[str, ...], expected: str, tiny: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", found.append)
    config = validate(RunConfig, tiny(*overrides))
    set_tf32(config.precision, torch.device("cuda"))
    assert found == [expected]
    # The CPU setting is not changed: there it would allow other rounding.
    assert str(resolve(config, None)) == "fp32"
    assert found == [expected]
