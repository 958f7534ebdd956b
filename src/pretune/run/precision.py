"""Resolve how a run computes on the available device: the precision for `precision=auto`, the number of threads, and
whether to compile. The precision chosen when a run began is kept by all later tasks on that run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretune.compute.allocator import use_expandable_segments
from pretune.compute.choice import Choice, Rate, capabilities, choose, slower
from pretune.compute.compilation import cache_compiled_code, why_not_compiled
from pretune.compute.config import OPTIONS, Activations
from pretune.compute.determinism import use_deterministic_algorithms
from pretune.compute.device import pick_device, undetected_gpu
from pretune.compute.hardware import measure_product
from pretune.compute.precision import check_float8, set_tf32
from pretune.compute.threads import use_threads
from pretune.core.config import ConfigError
from pretune.core.terminal import warn
from pretune.run.config import RunConfig
from pretune.run.folder import RunFolder, cache_folder, read_config
from pretune.run.library_model import without_what_it_lacks
from pretune.run.tokenizer import with_added_tokens


@dataclass(frozen=True)
class Resolved:
    """A run whose `precision.compute` is not `auto`, and whose model has room for the tokens that it adds."""

    config: RunConfig
    device: torch.device
    why: str
    """The reason for the precision, in a few words; empty if it was set by name."""
    notes: tuple[str, ...]
    """Notes for the user, one line each."""

    def __str__(self) -> str:
        """`fp32 (this CPU has no bf16 instructions)`."""
        section = self.config.precision
        rounded = section.tf32 and section.compute == "float32" and self.device.type == "cuda"
        name = "tf32" if rounded else OPTIONS[section.compute]
        return f"{name} ({self.why})" if self.why else name

    def recorded(self, mapping: Mapping[str, Any]) -> dict[str, Any]:
        """`mapping`, the run's configuration, with the chosen precision and the vocabulary that the tokens need which
        the run adds."""
        found = {**mapping, "precision": {**mapping["precision"], "compute": self.config.precision.compute}}
        if self.config.data.tokenizer.add_tokens:
            found["model"] = {**mapping["model"], "vocab_size": self.config.model.vocab_size}
        return found


def resolve(config: RunConfig, run: RunFolder | None, rate: Rate | None = None) -> Resolved:
    """Choose the device and the precision: the configured one or, for `auto`, the one that `run` was trained in if it
    exists, else the fastest on the device. Settings of the process (threads, determinism, TF32, compiler cache) are
    made. The model's vocabulary becomes large enough for data.tokenizer.add_tokens.

    rate: FLOP/s in a precision, asked only if the choice depends on it; by default it is measured.

    Raises ConfigError for a device that does not exist or does not support the precision, and what
    with_added_tokens raises.
    """
    device, config = pick_device(config.device), with_added_tokens(config)
    _set_process(config, device)

    def measured(precision: Activations) -> float:
        return measure_product(device, precision, config.model.dim, config.model.mlp_dim)

    rate = rate or measured
    able, asked, before = capabilities(device), config.precision.compute, _trained_in(run)
    best = choose(able, rate)
    notes = []
    if asked == "auto":
        compute, why = (best.compute, best.why) if before is None else (before, "as the run began")
    else:
        compute, why = asked, ""
        if before not in (None, asked) and config.task == "train":
            notes.append(f"from here on {OPTIONS[compute]}, as asked; so far this run was trained in {OPTIONS[before]}")
    config = _with(config, compute=compute)
    if config.task == "train":
        check_float8(config.precision, device, OPTIONS[best.compute])
    factor = slower(config.precision.activations, able, best, rate)
    if factor is not None:
        notes.append(_slow(compute, factor, best, before))
    if config.device == "auto" and device.type == "cpu" and (gpu := undetected_gpu(Path("/"))):
        notes.append(f"computing on the CPU: {gpu}; set device=cpu if you want the CPU")
    config, lacking_in_model = without_what_it_lacks(config)
    notes += lacking_in_model
    if _compiles(config) and (lacking := why_not_compiled(device)):
        config = _uncompiled(config, lacking)
        notes.append(f"not compiled: {lacking}; uncompiled, everything is slower and training takes more memory")
    return Resolved(config, device, why, tuple(notes))


def resolved_config(config: RunConfig, run: RunFolder | None) -> RunConfig:
    """The configuration with the precision chosen, for tasks that only read a run; notes go to the terminal."""
    found = resolve(config, run)
    print_notes(found)
    return found.config


def print_notes(found: Resolved) -> None:
    """Print the notes for the user."""
    for note in found.notes:
        warn(f"note: {note}")


def _set_process(config: RunConfig, device: torch.device) -> None:
    """Set the number of threads, determinism, TF32 and the allocator on CUDA, and the folder for compiled code."""
    use_threads(config.threads)
    if config.deterministic:
        use_deterministic_algorithms()
    set_tf32(config.precision, device)
    use_expandable_segments(device, Path("/"))
    # Before importing the compiler, which would choose another folder. One folder per instruction set, because torch
    # 2.13 does not check whether cached code was compiled for this CPU's instructions.
    cache_compiled_code(cache_folder() / "compiled" / torch.backends.cpu.get_cpu_capability())


def _trained_in(run: RunFolder | None) -> Any:
    """The precision in which an existing run was trained."""
    if run is None or not run.config.is_file():
        return None
    found = read_config(run.config).get("precision", {}).get("compute")
    return found if found in OPTIONS else None


def _slow(compute: str, factor: float, best: Choice, before: str | None) -> str:
    name, better = OPTIONS[compute], OPTIONS[best.compute]
    whose = "which this run was trained in" if compute == before else "as asked"
    return f"{name}, {whose}, is {factor:.0f} times slower here than {better}; precision={better} switches to that"


def _compiles(config: RunConfig) -> bool:
    """Whether the task compiles anything."""
    match config.task:
        case "train":
            return config.precision.compile or config.optimizer.compiles_update
        case "plan":
            return config.precision.compile
        case "generate":
            return config.generate.compile
        case "evaluate":
            return config.evaluation.answers.compile
        case _:
            return False


def _uncompiled(config: RunConfig, lacking: str) -> RunConfig:
    """The configuration with compilation turned off; ConfigError if something cannot work without it."""
    if config.task == "train" and config.optimizer.compiles_update:
        raise ConfigError(f"optimizer={config.optimizer.kind} compiles its update, but {lacking}; use optimizer=adamw")
    answers = config.evaluation.answers.model_copy(update={"compile": False})
    changes = {
        "generate": config.generate.model_copy(update={"compile": False}),
        "evaluation": config.evaluation.model_copy(update={"answers": answers}),
    }
    return _with(config.model_copy(update=changes), compile=False)


def _with(config: RunConfig, **changes: Any) -> RunConfig:
    return config.model_copy(update={"precision": config.precision.model_copy(update=changes)})
