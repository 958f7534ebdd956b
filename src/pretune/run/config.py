"""RunConfig: every section of a run on one page. Rules between sections are in run/rules.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

import pydantic
from pydantic import Field

from pretune.adapters.config import AdapterConfig
from pretune.checkpoint.config import CheckpointConfig
from pretune.compute.config import PrecisionConfig
from pretune.core.config import MAY_DIFFER, Count, FilePath, Section
from pretune.data.config import DataConfig
from pretune.model.section import ModelSection
from pretune.objectives.config import ReferenceBase
from pretune.optim.config import BudgetConfig, OptimizerConfig, ScheduleConfig
from pretune.parallel.config import ParallelConfig
from pretune.quantization.config import QuantizationConfig
from pretune.run import rules
from pretune.run.sections import (
    BatchConfig,
    EvaluationConfig,
    SamplesConfig,
    StageConfig,
)
from pretune.run.task_config import (
    ExportConfig,
    GenerateConfig,
    InspectConfig,
    PlanConfig,
    PrepareConfig,
    ReportConfig,
)
from pretune.tracker.config import TrackerConfig
from pretune.training.config import DivergenceConfig, EarlyStoppingConfig, EMAConfig


class RunConfig(Section):
    renamed: ClassVar[Mapping[str, str]] = {
        "report_every": "log_every",
        "embedding_noise": "neftune_alpha",
        "show": "prepare.show",
        "averaging": "ema",
        "averaging.decay": "ema.decay",
        "averaging.warmup": "ema.warmup",
        "averaging.measure_raw": "ema.evaluate_raw",
        "evaluation.patience": "early_stopping.patience",
        "evaluation.min_delta": "early_stopping.min_delta",
        "evaluation.answers.batch": "evaluation.answers.batch_size",
        "generate.batch": "generate.batch_size",
    }

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._=,+-]*$"), MAY_DIFFER]
    """Name of the run and of its folder in output_dir."""
    task: Annotated[
        Literal["train", "prepare", "evaluate", "generate", "export", "report", "plan", "inspect"], MAY_DIFFER
    ]
    """The task to run."""
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    """Random seed for weights, data order and dropout."""
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], MAY_DIFFER]
    """Device to compute on; auto takes a GPU if there is one."""
    threads: Annotated[Count | None, MAY_DIFFER]
    """Number of CPU threads; null leaves it to torch, which uses one per core. Use fewer on a shared machine."""
    deterministic: Annotated[bool, MAY_DIFFER]
    """Make the run reproducible bit for bit on a GPU, where it is slower then; a CPU always computes this way."""
    output_dir: Annotated[FilePath, MAY_DIFFER]
    """Folder of all runs, relative to the working directory."""
    resume: Annotated[Literal["auto", "never", "must"], MAY_DIFFER]
    """auto resumes from the newest checkpoint if there is one; never refuses to resume; must refuses to start a new
    run."""
    model: ModelSection
    """The model: our transformer, or one that transformers builds."""
    data: DataConfig
    """The training and validation data."""
    stage: StageConfig
    """Pretraining, fine-tuning or preference optimization, and the weights to start from."""
    optimizer: OptimizerConfig
    """How weights are updated."""
    schedule: ScheduleConfig
    """How the learning rate changes over the budget."""
    adapter: AdapterConfig
    """What is trained: all weights, or a small adapter on a frozen model."""
    ema: EMAConfig
    """An exponential moving average of the weights, evaluated and used in place of the raw weights."""
    neftune_alpha: Annotated[float, Field(gt=0)] | None
    """NEFTune: training adds uniform noise of at most this / sqrt(sequence_length * dim) to each value of the embedded
    tokens (5 to 15 for instruction tuning); null adds none."""
    quantization: QuantizationConfig
    """Quantization of weights: of frozen ones during training, or of all weights."""
    precision: PrecisionConfig
    """Precision, compilation and activation checkpointing."""
    tracker: Annotated[TrackerConfig, MAY_DIFFER]
    """Where metrics go."""
    budget: BudgetConfig
    """When the run ends."""
    parallel: Annotated[ParallelConfig, MAY_DIFFER]
    """How training is spread over several processes."""
    batch: BatchConfig
    """How much one step reads."""
    evaluation: EvaluationConfig
    """How the model is evaluated on the validation set."""
    early_stopping: EarlyStoppingConfig
    """When a run ends before its budget is used up."""
    divergence: Annotated[DivergenceConfig, MAY_DIFFER]
    """When a run is given up, because its numbers are no longer finite."""
    samples: Annotated[SamplesConfig, MAY_DIFFER]
    """Texts that the model generates during training."""
    checkpoint: Annotated[CheckpointConfig, MAY_DIFFER]
    """When checkpoints are saved, and which one is used."""
    prepare: Annotated[PrepareConfig, MAY_DIFFER]
    """task=prepare."""
    generate: Annotated[GenerateConfig, MAY_DIFFER]
    """task=generate."""
    export: Annotated[ExportConfig, MAY_DIFFER]
    """task=export."""
    report: Annotated[ReportConfig, MAY_DIFFER]
    """task=report."""
    plan: Annotated[PlanConfig, MAY_DIFFER]
    """task=plan."""
    inspect: Annotated[InspectConfig, MAY_DIFFER]
    """task=inspect."""
    log_every: Annotated[Count, MAY_DIFFER]
    """Steps between reports of training loss and speed."""

    @pydantic.model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if broken := rules.broken(self):
            raise ValueError("\n".join(broken))
        return self

    @property
    def reference(self) -> Literal["model", "adapter_off", "cached"]:
        """Where the reference model comes from, with `auto` resolved."""
        assert isinstance(self.stage.objective, ReferenceBase), "it has no reference model"
        if self.stage.objective.reference != "auto":
            return self.stage.objective.reference
        return "adapter_off" if self.adapter.starts_at_zero else "model"

    @property
    def accumulation(self) -> int:
        """Gradient accumulation: micro-batches per optimizer step; only if micro_batch is not auto."""
        assert self.batch.micro_batch != "auto", "only the loop knows: it finds the largest that fits"
        return self.batch.tokens // (self.data.sequence_length * self.batch.micro_batch)

    def is_step(self, size: int) -> bool:
        """Whether one micro-batch of `size` sequences is as large as the largest optimizer step."""
        return size * self.data.sequence_length >= self.batch.tokens
