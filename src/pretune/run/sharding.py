"""What cannot be trained with its parameters shared out over processes (parallel=fsdp)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from pretune.compute.config import PrecisionConfig
from pretune.optim.config import OptimizerConfig
from pretune.parallel.config import ParallelConfig
from pretune.quantization.config import QuantizationConfig


class Run(Protocol):
    """The part of a RunConfig that this rule reads."""

    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def quantization(self) -> QuantizationConfig: ...
    @property
    def precision(self) -> PrecisionConfig: ...


def shared_parameters_are_plain(run: Run) -> Iterator[str]:
    if run.parallel.kind != "fsdp":
        return
    wanted = {
        f"quantization={run.quantization.kind}": run.quantization.needs_adapter,
        f"optimizer={run.optimizer.kind}": run.optimizer.compiles_update,
        "precision=fp8": run.precision.compute == "float8",
    }
    if refused := [key for key, is_set in wanted.items() if is_set]:
        does = "does" if len(refused) == 1 else "do"
        yield f"{', '.join(refused)} {does} not work with parallel=fsdp: use parallel=ddp"
