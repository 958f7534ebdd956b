"""Speed and memory of a step: compilation, activation checkpointing, and reuse of freed memory."""

from __future__ import annotations

import ctypes
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

RECOMPUTATION = {"ban_recompute_used_far_apart": False, "ban_recompute_materialized_backward": False}
"""Options of torch.compile's partitioner: the backward pass recomputes cheap operations (norms, activations, casts)
instead of reading their results. That saves a third of a small model's memory, at no cost in time. Long chains of such
operations stay banned: recomputing the residual stream would do so for all layers at once, and keep the results."""


def compile_step(loss: Callable[P, R], checkpointed: bool = False) -> Callable[P, R]:
    """Compile `loss` for the shapes that it is called with; new shapes are compiled at their first call.

    The backward pass recomputes as RECOMPUTATION says; with `checkpointed` activations, checkpointing decides instead.
    """
    import torch
    import torch._functorch.config as partitioner

    compiled = torch.compile(loss, dynamic=False)
    if checkpointed:
        # Not both: torch 2.13 would draw new dropout masks when recomputing a block, and gradients would be wrong.
        return compiled

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with partitioner.patch(RECOMPUTATION):
            return compiled(*args, **kwargs)

    return run


def compile_blocks(blocks: Iterable[nn.Module], checkpointed: bool = False) -> None:
    """Compile the forward pass of each of `blocks` in training by itself, see compile_step; what hooks do around it
    stays as it is. Call it after checkpoint_activations."""
    import torch._dynamo.config as tracer

    blocks = [*blocks]

    def of(block: nn.Module) -> Callable[..., Tensor]:
        plain, compiled = block.forward, compile_step(block.forward, checkpointed)

        def run(*args: Any, **kwargs: Any) -> Tensor:
            if not block.training:  # evaluation and generation have other shapes
                return plain(*args, **kwargs)
            with tracer.patch(recompile_limit=2 * len(blocks) + 8):  # blocks may differ, in windows for example
                return compiled(*args, **kwargs)

        return run

    for block in blocks:
        block.forward = of(block)


def compile_frozen(step: Callable[[Tensor, T], Tensor]) -> Callable[[Tensor, T], Tensor]:
    """A step of generation, (tokens [B, 1], cache) -> logits, compiled for each shape that it meets with its weights as
    constants: the compiler converts and lays them out for the processor once. Later changes of weights have no effect.
    """
    import torch
    import torch._inductor.config as inductor

    # Code compiled for another model contains that model's weights and must not be reused.
    torch.compiler.reset()
    fixed, flexible = (torch.compile(step, dynamic=dynamic) for dynamic in (False, True))

    def run(tokens: Tensor, cache: T) -> Tensor:
        # For several rows in float32, the compiler uses MKL's weight layout if the number of rows is static, and
        # oneDNN's if it is dynamic; MKL takes twice as long.
        for_mkl = len(tokens) > 1 and tokens.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        # Not via `options`, which the tracer does not see: the weights would become inputs instead of constants.
        with inductor.patch(freezing=True):
            return (flexible if for_mkl else fixed)(tokens, cache)

    return run


def why_not_compiled(device: torch.device) -> str | None:
    """Why torch.compile does not work for `device` on this machine, and what to install; None if it does."""
    import torch

    if device.type == "mps":
        # torch 2.13 calls it an early prototype. RMSNorm has come out wrong (pytorch issues 150454 and 150629).
        return "torch's compiler for Apple's GPU is a prototype"
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 7:
            name = torch.cuda.get_device_name(device)
            return f"{name} (compute capability {major}.{minor}) is too old for torch's compiler, which needs 7.0"
    return _missing_tools()


def _missing_tools() -> str | None:
    """What torch.compile needs on the machine and does not find."""
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
    """Make torch.compile cache compiled code in `folder`, for later runs with the same shapes, unless
    TORCHINDUCTOR_CACHE_DIR is set."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder.absolute()))


def checkpoint_activations(blocks: Iterable[nn.Module]) -> None:
    """Keep only the inputs of each of `blocks` for the backward pass, which then recomputes the rest.

    Names, parameters, results and gradients do not change; without gradients nothing is recomputed. Call it before
    compiling. Source: arXiv 1604.06174.
    """
    from torch.utils.checkpoint import checkpoint

    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def keep_freed_memory() -> None:
    """Make the C library keep memory that a training step on the CPU frees, instead of returning it to the kernel.

    Otherwise the kernel provides (and clears) the same hundreds of megabytes at every step, page by page: 10-15% of the
    time of a small model. Does nothing if the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 30)
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # values from malloc.h
