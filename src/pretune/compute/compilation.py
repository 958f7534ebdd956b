"""What is done to a step from outside, for speed and memory: compilation, activation checkpointing, and what becomes of
freed memory."""

from __future__ import annotations

import ctypes
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

MEMORY_BUDGET = 0.9
"""Share of what would be kept for the backward pass that may be kept. Anything below 1 makes the partitioner try cheap
recomputation first, and that alone saves more than a tenth."""


def compile_step(loss: Callable[P, R], checkpointed: bool = False) -> Callable[P, R]:
    """`loss` compiled for the shapes that it is called with; other shapes are compiled when they first come.

    The backward pass computes cheap things again (norms, activations, casts) and the forward pass keeps only what
    matrix products and attention read: a third less memory for a small model, at no cost in time, because reading a
    tensor back takes as long as making it again. Where activations are `checkpointed`, that says what is kept.
    """
    import torch
    import torch._functorch.config as partitioner

    compiled = torch.compile(loss, dynamic=False)
    if checkpointed:
        # Not both: torch 2.13 would draw dropout anew when it computes a block a second time, and gradients be wrong.
        return compiled

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with partitioner.patch(activation_memory_budget=MEMORY_BUDGET):
            return compiled(*args, **kwargs)

    return run


def compile_frozen(step: Callable[[Tensor, T], Tensor]) -> Callable[[Tensor, T], Tensor]:
    """A step of generation, (tokens [B, 1], cache) -> logits, compiled for each shape that it meets with its weights as
    constants: the compiler converts and lays them out for the processor once. Later changes of weights have no effect.
    """
    import torch
    import torch._inductor.config as inductor

    # What was compiled for another model's weights must not be taken for this one's.
    torch.compiler.reset()
    fixed, flexible = (torch.compile(step, dynamic=dynamic) for dynamic in (False, True))

    def run(tokens: Tensor, cache: T) -> Tensor:
        # For several rows in float32 the compiler lays weights out for MKL where it knows their number, and for oneDNN
        # where it does not; MKL takes twice as long.
        for_mkl = len(tokens) > 1 and tokens.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        # Not `options`, which the tracer does not see: it would hand the weights in as inputs.
        with inductor.patch(freezing=True):
            return (flexible if for_mkl else fixed)(tokens, cache)

    return run


def why_not_compiled() -> str | None:
    """What this machine lacks for torch.compile, and how to get it; None where nothing is missing."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        wanted = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        remedy = "xcode-select --install" if sys.platform == "darwin" else "apt install g++"
        return f"there is no C++ compiler ({wanted}) on this machine ({remedy})"
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not headers.is_file():
        return f"Python's C headers ({headers}) are not on this machine (apt install python3-dev)"
    return None


def cache_compiled_code(folder: Path) -> None:
    """Let torch.compile keep what it compiles in `folder`, for later runs of the same shapes; unless
    TORCHINDUCTOR_CACHE_DIR says where."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder.absolute()))


def checkpoint_activations(blocks: Iterable[nn.Module]) -> None:
    """From now on keep only what goes into each of `blocks` for the backward pass, and compute the rest a second time.

    Names, parameters and results stay what they are, gradients too; without gradients nothing is computed twice. Do it
    before compiling. Source: arXiv 1604.06174.
    """
    from torch.utils.checkpoint import checkpoint

    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def keep_freed_memory() -> None:
    """Let the C library keep what a training step on the CPU frees, for the next step, instead of returning it.

    Otherwise the kernel hands out (and clears) the same hundreds of megabytes at every step, a page at a time: 10-15%
    of the time of a small model. Does nothing where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 30)
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as in malloc.h
