"""Choose the fastest precision for a device, from what torch reports about it, or else by measuring.

NVIDIA with bfloat16 (compute capability 8.0 and newer), AMD    bfloat16
older NVIDIA with fast float16 (6.0, 7.0, 7.2, 7.5)             float16 with loss scaling
any other NVIDIA, Apple's GPU                                   the fastest as measured
CPU with AMX or AVX-512-BF16                                    bfloat16
any other x86 CPU                                               float32
any other CPU (ARM)                                             the fastest as measured
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pretune.compute.config import OPTIONS, Activations

if TYPE_CHECKING:
    import torch

Rate = Callable[[Activations], float]
"""Measures the FLOP/s of a matrix product with the model's shapes in a precision."""

CLEARLY = 1.2
"""Required speedup of 16-bit matrix products over float32, and of float16 over bfloat16, before switching: the rest of
a step gains less, and bfloat16 needs no loss scaling."""

_FAST_HALF = ((6, 0), (6, 2), (7, 0), (7, 2), (7, 5))
"""Compute capabilities without bfloat16 whose float16 products are at least twice as fast as float32. 5.x has no
float16 instructions, and 6.1 has them only for compatibility, at 1/64 of the rate."""


@dataclass(frozen=True)
class Capabilities:
    """A device's 16-bit capabilities. bfloat16, float16: whether they are fast; None: unknown."""

    bfloat16: bool | None
    float16: bool | None
    how: str = ""
    """The source of the answer for bfloat16, in a few words."""


@dataclass(frozen=True)
class Choice:
    """A precision and the reason for it, in a few words."""

    compute: Activations
    why: str


def choose(capabilities: Capabilities, rate: Rate) -> Choice:
    """The fastest precision of a device; `rate` is called only for precisions whose speed is unknown."""
    if capabilities.bfloat16:
        return Choice("bfloat16", capabilities.how)
    if capabilities.bfloat16 is False and capabilities.float16 is not None:
        return Choice("float16" if capabilities.float16 else "float32", capabilities.how)
    candidates: list[Activations] = ["float32"]
    if capabilities.bfloat16 is None:
        candidates.append("bfloat16")
    if capabilities.float16 is None:
        candidates.append("float16")
    rates = {one: rate(one) for one in candidates}
    best = candidates[0]
    for other in candidates[1:]:
        best = other if rates[other] > CLEARLY * rates[best] else best
    if best != "float32":
        return Choice(best, f"measured: {rates[best] / rates['float32']:.1f} times as fast as fp32")
    other = max(candidates[1:], key=rates.__getitem__)
    return Choice(best, f"measured: {OPTIONS[other]} reaches {rates[other] / rates['float32']:.2f} of its speed")


def slower(asked: Activations, capabilities: Capabilities, choice: Choice, rate: Rate) -> float | None:
    """The speedup of `choice` over the precision that was asked for; None if it is not clearly faster.

    Only for 16-bit precisions, which are chosen for speed: float32 is chosen for accuracy.
    """
    known_fast = capabilities.bfloat16 if asked == "bfloat16" else capabilities.float16
    if asked in ("float32", choice.compute) or known_fast:
        return None
    factor = rate(choice.compute) / rate(asked)
    return factor if factor > CLEARLY else None


def capabilities(device: torch.device) -> Capabilities:
    """The capabilities that torch reports for `device`."""
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        # Exclude emulation: by default, torch reports bfloat16 as supported even on a T4.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        if torch.version.hip is not None:
            return Capabilities(native, True, name)
        capability = torch.cuda.get_device_capability(device)
        how = f"{name}, compute capability {capability[0]}.{capability[1]}"
        half = True if native or capability in _FAST_HALF else None
        return Capabilities(native, half, how if native else f"{how}: no bf16 before 8.0")
    if device.type == "mps":
        return Capabilities(None, None)
    return _cpu_capabilities(platform.machine(), torch.cpu.get_capabilities(), _held_back())


def _cpu_capabilities(machine: str, flags: Mapping[str, Any], held_back: bool) -> Capabilities:
    """Capabilities of a CPU with these instruction sets; `held_back`: the environment limits which ones torch uses."""
    if machine.lower() not in ("x86_64", "amd64", "i386", "i686"):
        return Capabilities(None, False)
    native = [name for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512-BF16")) if flags.get(flag)]
    if native and held_back:
        return Capabilities(None, False)
    # Without native instructions, torch computes 16-bit products in a scalar loop: 20 to 100 times slower.
    return Capabilities(bool(native), False, native[0] if native else "this CPU has no bf16 instructions")


def _held_back() -> bool:
    return any(os.environ.get(name) for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"))
