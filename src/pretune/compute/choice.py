"""Which arithmetic a device does fast: from what torch knows of it, else by trying.

NVIDIA with bfloat16 (compute capability 8.0 and newer), AMD    bfloat16
NVIDIA before that, with fast float16 (6.0, 7.0, 7.2, 7.5)      float16, the loss scaled
any other NVIDIA, Apple's GPU                                   what is measured to be fastest
CPU with AMX or AVX-512-BF16                                    bfloat16
any other x86 CPU                                               float32
any other CPU (ARM)                                             what is measured to be fastest
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
"""FLOP/s of a matrix product of the model's shapes in an arithmetic, measured when it is asked for."""

CLEARLY = 1.2
"""How many times as fast a product in 16 bits has to be for float32 to be given up, and one in float16 for bfloat16 to
be: the rest of a step gains less, and bfloat16 needs no scaling of the loss."""

_FAST_HALF = ((6, 0), (6, 2), (7, 0), (7, 2), (7, 5))
"""Compute capabilities without bfloat16 that multiply in float16 at twice the rate of float32 or more. 5.x has no such
instructions, and those of 6.1 are there for compatibility: 1/64 of the rate."""


@dataclass(frozen=True)
class Capabilities:
    """What is known of a device's 16-bit arithmetic. bfloat16, float16: whether it is done fast; None: not known."""

    bfloat16: bool | None
    float16: bool | None
    how: str = ""
    """What the answer for bfloat16 is from, in a few words."""


@dataclass(frozen=True)
class Choice:
    """An arithmetic, and why, in a few words."""

    compute: Activations
    why: str


def choose(capabilities: Capabilities, rate: Rate) -> Choice:
    """The fastest arithmetic of a device; `rate` is asked only for what its capabilities leave open."""
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
    """How many times as fast as the arithmetic that was asked for `choice` is; None where it is not clearly so.

    Only of 16 bits, whose purpose is speed: float32 is asked for when exactness matters.
    """
    known_fast = capabilities.bfloat16 if asked == "bfloat16" else capabilities.float16
    if asked in ("float32", choice.compute) or known_fast:
        return None
    factor = rate(choice.compute) / rate(asked)
    return factor if factor > CLEARLY else None


def capabilities(device: torch.device) -> Capabilities:
    """What torch knows of `device`."""
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        # Without emulation: by default it answers for a T4, too, that bfloat16 is supported.
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
    """Of a CPU with these instruction sets; `held_back`: torch is told not to use all of them."""
    if machine.lower() not in ("x86_64", "amd64", "i386", "i686"):
        return Capabilities(None, False)
    native = [name for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512-BF16")) if flags.get(flag)]
    if native and held_back:
        return Capabilities(None, False)
    # Without instructions for it torch multiplies 16 bits in a scalar loop: twenty to a hundred times slower.
    return Capabilities(bool(native), False, native[0] if native else "this CPU has no bf16 instructions")


def _held_back() -> bool:
    return any(os.environ.get(name) for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"))
