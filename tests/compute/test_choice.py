"""The precision chosen for a device: a dozen devices as torch describes them; the tests need none of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from pretune.compute import choice
from pretune.compute.choice import Capabilities, capabilities, choose, slower
from pretune.compute.config import Activations

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def rates(**found: float) -> choice.Rate:
    """The rates that would be measured; no other may be asked for."""
    return lambda precision: found[precision]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """`gpu(name, capability)`: torch's own answers on a machine with that NVIDIA GPU."""

    def install(name: str, capability: tuple[int, int]) -> torch.device:
        # Torch emulates bfloat16 on older GPUs, and by default reports it as supported there.
        def supported(including_emulation: bool = True) -> bool:
            return including_emulation or capability >= (8, 0)

        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        return CUDA

    return install


@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [
        ("NVIDIA A100-SXM4-40GB", (8, 0), "bfloat16"),
        ("NVIDIA H100 80GB HBM3", (9, 0), "bfloat16"),
        ("NVIDIA GeForce RTX 4090", (8, 9), "bfloat16"),
        ("NVIDIA GeForce RTX 3090", (8, 6), "bfloat16"),
        ("NVIDIA GeForce RTX 5090", (12, 0), "bfloat16"),
        ("Tesla T4", (7, 5), "float16"),
        ("Tesla V100-SXM2-16GB", (7, 0), "float16"),
        ("Tesla P100-PCIE-16GB", (6, 0), "float16"),
    ],
)
def test_nvidia(gpu, name: str, capability: tuple[int, int], expected: Activations) -> None:
    found = choose(capabilities(gpu(name, capability)), rates())
    assert found.compute == expected
    assert name in found.why
    assert ("no bf16" in found.why) == (expected == "float16")


def test_an_old_nvidia_gpu_is_measured(gpu) -> None:
    able = capabilities(gpu("NVIDIA GeForce GTX 1080", (6, 1)))
    assert choose(able, rates(float32=8e12, float16=1.3e11)).compute == "float32"
    assert choose(able, rates(float32=8e12, float16=1.5e13)).compute == "float16"


def test_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "AMD Instinct MI300X")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert choose(capabilities(CUDA), rates()).compute == "bfloat16"


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ({"float32": 3e12, "bfloat16": 3.1e12, "float16": 3.2e12}, "float32"),
        ({"float32": 3e12, "bfloat16": 5e12, "float16": 5.2e12}, "bfloat16"),
        ({"float32": 3e12, "bfloat16": 1e12, "float16": 5e12}, "float16"),
    ],
)
def test_apple_gets_what_is_measured_to_be_clearly_faster(measured: Mapping[str, float], expected: str) -> None:
    found = choose(capabilities(torch.device("mps")), rates(**measured))
    assert found.compute == expected
    assert "measured" in found.why


ZEN_3 = {"avx2": True, "fma3": True, "avx512_f": False, "avx512_bf16": False, "amx_bf16": False}
CPUS = [
    ("Xeon, Sapphire Rapids", "x86_64", {"avx512_bf16": True, "amx_bf16": True}, "bfloat16", "AMX"),
    ("EPYC, Zen 4", "x86_64", {**ZEN_3, "avx512_f": True, "avx512_bf16": True}, "bfloat16", "AVX-512-BF16"),
    ("EPYC, Zen 3", "x86_64", ZEN_3, "float32", "no bf16 instructions"),
    ("Xeon, Skylake", "x86_64", {**ZEN_3, "avx512_f": True, "avx512_vnni": True}, "float32", "no bf16 instructions"),
    ("Core of 2012", "AMD64", {"avx": True}, "float32", "no bf16 instructions"),
]


@pytest.mark.parametrize(
    ("machine", "flags", "expected", "why"), [one[1:] for one in CPUS], ids=[one[0] for one in CPUS]
)
def test_x86(
    monkeypatch: pytest.MonkeyPatch, machine: str, flags: dict[str, Any], expected: Activations, why: str
) -> None:
    monkeypatch.setattr(choice.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    found = choose(capabilities(CPU), rates())
    assert found.compute == expected
    assert why in found.why


def test_a_cpu_that_is_held_back_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert choose(capabilities(CPU), rates(float32=1.9e11, bfloat16=3.4e9)).compute == "float32"
    assert choose(capabilities(CPU), rates(float32=1.9e11, bfloat16=4e11)).compute == "bfloat16"


def test_arm_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    found = choose(capabilities(CPU), rates(float32=1e11, bfloat16=5e9))
    assert found.compute == "float32"
    assert "bf16 reaches 0.05" in found.why
    assert choose(capabilities(CPU), rates(float32=1e11, bfloat16=3e11)).compute == "bfloat16"


def test_this_machine_gets_an_answer() -> None:
    from pretune.compute.hardware import measure_product

    able = capabilities(CPU)
    found = choose(able, lambda precision: measure_product(CPU, precision, 256, 704))
    measured = {one: measure_product(CPU, one, 256, 704) for one in ("float32", "bfloat16")}
    # bfloat16 with and without instructions for it differ by more than a factor of 4, even on a busy machine.
    other = "float32" if found.compute == "bfloat16" else "bfloat16"
    assert measured[found.compute] > measured[other] / 4


def test_what_was_asked_for_is_slow_only_where_it_clearly_is() -> None:
    zen_3 = Capabilities(False, False)
    best = choose(zen_3, rates())
    assert slower("bfloat16", zen_3, best, rates(float32=9e10, bfloat16=3e9)) == pytest.approx(30)
    assert slower("bfloat16", zen_3, best, rates(float32=9e10, bfloat16=8e10)) is None
    assert slower("float32", zen_3, best, rates()) is None
    a100 = Capabilities(True, True)
    best = choose(a100, rates())
    assert slower("float16", a100, best, rates()) is None
    assert slower("float32", a100, best, rates()) is None, "exactness is a reason of its own"
