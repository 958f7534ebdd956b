"""RunConfig: every room's configuration on one page, and what must hold between rooms.

It stands between the rooms, whose sections it composes, and the verbs, which read it.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

from pretune.adapters.config import AdapterConfig
from pretune.checkpoint.store import CheckpointConfig
from pretune.compute.config import FLOAT8_MULTIPLE, PrecisionConfig
from pretune.core.config import Every, Section
from pretune.data.config import DataConfig
from pretune.generation.config import DecodingConfig
from pretune.model.config import ModelConfig
from pretune.objectives.config import DPOConfig, ObjectiveConfig
from pretune.optim.config import BudgetConfig, OptimizerConfig, ScheduleConfig
from pretune.quantization.config import QatConfig, QuantizationConfig, RoundingConfig, misfit_of_groups
from pretune.run.task_config import ExportConfig, GenerateConfig, PlanConfig, ReportConfig
from pretune.tracker.config import TrackerConfig
from pretune.training.averaging import AveragingConfig

Count = Annotated[int, Field(ge=1)]


class StageConfig(Section):
    kind: Literal["pretrain", "finetune", "dpo"]
    """Where in a model's life this run stands; wandb's job_type. All are the same loop."""
    init_from: str | None
    """Weights to start from: a run's name or folder; null starts from random weights."""
    objective: ObjectiveConfig
    """What is minimised."""

    @pydantic.model_validator(mode="after")
    def _finetune_needs_a_start(self) -> Self:
        if self.kind == "finetune" and self.init_from is None:
            raise ValueError("fine-tuning needs weights to start from: set init_from to a run's name or folder")
        if self.kind == "dpo" and self.init_from is None:
            raise ValueError("preferences are measured against where the model starts from: set init_from to a run")
        return self

    @pydantic.model_validator(mode="after")
    def _dpo_has_its_objective(self) -> Self:
        if (self.kind == "dpo") != (self.objective.kind == "dpo"):
            raise ValueError(
                f"kind = {self.kind} with objective.kind = {self.objective.kind}: choose both by stage=dpo"
            )
        return self


class BatchWarmupConfig(Section):
    start: Count
    """Input tokens of the first step; divides batch.tokens, and is a multiple of sequence_length * micro_batch."""
    over: Count
    """Input tokens over which steps grow from `start` to batch.tokens: in a straight line, in multiples of `start`."""


class BatchConfig(Section):
    tokens: Annotated[int, Field(ge=1, le=2**28)]
    """Input tokens of one optimizer step, over all ranks; a multiple of sequence_length * micro_batch."""
    micro_batch: Count | Literal["auto"]
    """Sequences that go through the model at once; the rest of the batch is accumulated. auto takes as many as memory
    allows, and fewer when it runs out."""
    warmup: BatchWarmupConfig | None
    """Smaller steps at the beginning, when gradients agree and a large batch is wasted; null has them all alike."""

    @pydantic.model_validator(mode="after")
    def _start_divides(self) -> Self:
        if self.warmup is not None and self.tokens % self.warmup.start:
            raise ValueError(
                f"tokens ({self.tokens}) is not a multiple of warmup.start ({self.warmup.start}), by which steps grow"
            )
        return self

    @property
    def smallest(self) -> int:
        """Tokens of the smallest step; every step is a multiple of it."""
        return self.tokens if self.warmup is None else self.warmup.start

    def tokens_after(self, read: int) -> int:
        """Tokens of the step that comes after `read` tokens."""
        if self.warmup is None or read >= self.warmup.over:
            return self.tokens
        grown = (self.tokens - self.warmup.start) * read // self.warmup.over
        return self.warmup.start * (1 + grown // self.warmup.start)


class AnswersConfig(DecodingConfig):
    measure: bool
    """Let the model write answers to held-out problems and count the right ones, for formats mathqa and gsm8k."""
    batch: Count
    """Problems that are answered at once; it changes nothing but speed."""
    compile: bool
    """Compile the step for one token, in task=evaluate: a second or so for each layer at the start, then faster."""


class EvaluationConfig(Section):
    every: Every
    """Steps between evaluations; null evaluates only at the end."""
    at_start: bool
    """Evaluate before the first step too."""
    patience: Count | None
    """End the run early after this many evaluations in a row in which val/loss did not get better; null never does."""
    min_delta: Annotated[float, Field(ge=0)]
    """What val/loss has to fall by, in nats, to count as better for `patience`."""
    micro_batch: Count
    """Sequences that are evaluated at once."""
    option_accuracy: bool
    """Multiple-choice accuracy by likelihood, for formats that have options."""
    max_problems: Count | None
    """Problems for option accuracy and answers; null takes the whole validation set."""
    answers: AnswersConfig
    """Answers that the model writes itself."""

    @pydantic.model_validator(mode="after")
    def _patience_needs_evaluations(self) -> Self:
        if self.patience is not None and self.every is None:
            raise ValueError("patience counts evaluations, and every = null makes none; set every to a number of steps")
        return self


class SamplesConfig(DecodingConfig):
    every: Every
    """Steps between samples; null samples only at the end."""
    prompts: tuple[str, ...]
    """Texts to continue, or questions to answer; none switches sampling off."""
    template: bool
    """Put a prompt as the run's data puts a question (instruction, chat template...); false continues it as it is."""


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._=,+-]*$")]
    """The run's name and the name of its folder in output_dir."""
    task: Literal["train", "prepare", "evaluate", "generate", "export", "report", "plan"]
    """What to do."""
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    """Weights, order of the data and dropout."""
    device: Literal["auto", "cpu", "cuda", "mps"]
    """Where to compute; auto takes a GPU if there is one."""
    threads: Annotated[int, Field(ge=1)] | None
    """Threads of the CPU that compute; null leaves it to torch, which takes one for each core. Fewer, where others use
    the machine too."""
    output_dir: str
    """Folder of all runs, relative to the working directory."""
    resume: Literal["auto", "never", "must"]
    """auto goes on from the newest checkpoint if there is one, never refuses to, must refuses to start anew."""
    model: ModelConfig
    """The transformer."""
    data: DataConfig
    """What it reads."""
    stage: StageConfig
    """Pretraining, fine-tuning or learning from preferences, and from what."""
    optimizer: OptimizerConfig
    """How weights are updated."""
    schedule: ScheduleConfig
    """How the learning rate moves over the budget."""
    adapter: AdapterConfig
    """What is trained: everything, or small weights beside a frozen model."""
    averaging: AveragingConfig
    """A moving average of the weights, measured and used in place of them."""
    embedding_noise: Annotated[float, Field(gt=0)] | None
    """NEFTune: training adds uniform noise of at most this / sqrt(sequence_length * dim) to each value of the embedded
    tokens (5 to 15 for instruction tuning); null adds none."""
    quantization: QuantizationConfig
    """How weights are stored in few bits: frozen ones in training, or all of them after it."""
    precision: PrecisionConfig
    """Arithmetic."""
    tracker: TrackerConfig
    """Where figures go."""
    budget: BudgetConfig
    """When the run ends."""
    batch: BatchConfig
    """How much one step reads."""
    evaluation: EvaluationConfig
    """How the validation set is measured."""
    samples: SamplesConfig
    """Texts that the model writes while it trains."""
    checkpoint: CheckpointConfig
    """When the run's state is saved."""
    generate: GenerateConfig
    """task=generate."""
    export: ExportConfig
    """task=export."""
    report: ReportConfig
    """task=report."""
    plan: PlanConfig
    """task=plan."""
    show: Annotated[int, Field(ge=0)]
    """task=prepare: documents of each set to print, with what is scored marked."""
    report_every: Count
    """Steps between reports of training loss and speed."""

    @pydantic.model_validator(mode="after")
    def _rooms_agree(self) -> Self:
        length, data, batch = self.data.sequence_length, self.data, self.batch
        if length > self.model.max_sequence_length:
            raise ValueError(
                f"data.sequence_length ({length}) is longer than the positions that the model has "
                f"(model.max_sequence_length = {self.model.max_sequence_length}); raise the one or lower the other"
            )
        rows = 1 if batch.micro_batch == "auto" else batch.micro_batch
        micro, key = length * rows, "batch.tokens" if batch.warmup is None else "batch.warmup.start"
        if batch.smallest % micro:
            below, above = batch.smallest // micro * micro, -(-batch.smallest // micro) * micro
            raise ValueError(
                f"{key} ({batch.smallest}) is not a multiple of data.sequence_length * batch.micro_batch "
                f"({length} * {rows} = {micro}); the nearest are " + " and ".join(str(n) for n in (below, above) if n)
            )
        if data.tokenizer.kind == "inherited" and self.stage.init_from is None:
            raise ValueError("data.tokenizer.kind = inherited needs stage.init_from to name the run to inherit from")
        if self.adapter.kind != "none" and self.stage.init_from is None:
            raise ValueError(
                f"adapter={self.adapter.kind} trains beside frozen weights, and random ones are worth nothing: set "
                "stage.init_from to a run's name or folder, or adapter=none"
            )
        if self.evaluation.option_accuracy and (data.format.kind != "mathqa" or data.format.rationale == "before"):
            raise ValueError(
                "evaluation.option_accuracy compares the likelihood of options straight after the prompt: it needs "
                "data.format.kind = mathqa with rationale none or after; or set it to false"
            )
        if self.evaluation.answers.measure and data.format.kind not in ("mathqa", "gsm8k"):
            raise ValueError(
                f"evaluation.answers.measure: written answers can be told right from wrong for data.format.kind = "
                f"mathqa or gsm8k, not {data.format.kind}; set it to false"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _float8_fits(self) -> Self:
        if self.precision.compute != "float8":
            return self
        if self.adapter.kind != "none":
            raise ValueError(
                f"precision=fp8 multiplies whole weight matrices in 8 bits, and adapter={self.adapter.kind} trains "
                "beside them: take precision=bf16, or adapter=none"
            )
        length, rows = self.data.sequence_length, 1 if self.batch.micro_batch == "auto" else self.batch.micro_batch
        if length * rows % FLOAT8_MULTIPLE:
            raise ValueError(
                f"precision=fp8 needs micro-batches of a multiple of {FLOAT8_MULTIPLE} tokens; sequences of {length} "
                f"times {rows} are {length * rows}; take a data.sequence_length that {FLOAT8_MULTIPLE} divides"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _quantization_has_an_adapter(self) -> Self:
        if self.quantization.kind != "qlora_nf4":
            return self
        if self.adapter.kind == "none":
            raise ValueError(
                f"quantization={self.quantization.kind} freezes weights in few bits, which full fine-tuning would have "
                "to train: choose adapter=lora (dora, loha, lokr), or quantization=none"
            )
        if self.adapter.kind == "dora" and self.adapter.dropout:
            raise ValueError(
                "adapter=dora with dropout needs its weights in full precision: set adapter.dropout=0.0 or "
                "quantization=none"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _rounding_fits(self) -> Self:
        section, adapter = self.quantization, self.adapter
        if not isinstance(section, RoundingConfig):
            return self
        if self.task == "train" and not isinstance(section, QatConfig):
            raise ValueError(
                f"quantization={section.kind} rounds a model that has been trained: train with quantization=none, then "
                f"take task=evaluate, generate or export with quantization={section.kind}; or train with "
                "quantization=qat_int8_int4"
            )
        if self.task == "train" and adapter.kind != "none" and adapter.dropout:
            raise ValueError(
                "quantization=qat_int8_int4 rounds the sum of a weight and its adapter, and dropout would part the "
                "two: set adapter.dropout=0.0"
            )
        if self.precision.compute == "float8" and isinstance(section, QatConfig):
            raise ValueError("quantization=qat_int8_int4 rounds to other numbers than precision=fp8: take bf16")
        if (misfit := misfit_of_groups(section, self.model.matrix_inputs())) is not None:
            raise ValueError(misfit)
        return self

    @pydantic.model_validator(mode="after")
    def _preferences_have_a_reference(self) -> Self:
        objective, adapter = self.stage.objective, self.adapter
        if (objective.kind == "dpo") != (self.data.format.kind == "preference"):
            raise ValueError(
                f"stage.objective.kind = {objective.kind} with data.format.kind = {self.data.format.kind}: stage=dpo "
                "learns from data.format.kind = preference, such as data=ultrafeedback, and from no other"
            )
        if not isinstance(objective, DPOConfig):
            return self
        if self.model.dropout or self.embedding_noise or (adapter.kind != "none" and adapter.dropout):
            raise ValueError(
                "noise would set the model apart from its reference by chance alone: for stage=dpo set model.dropout "
                "and adapter.dropout to 0 and embedding_noise to null"
            )
        if objective.reference == "adapter_off" and not self._adapter_starts_from_nothing:
            raise ValueError(
                "stage.objective.reference = adapter_off needs a new adapter that starts without an update "
                "(adapter.kind not none, adapter.init not pissa, adapter.init_from null); take model or cached"
            )
        return self

    @property
    def _adapter_starts_from_nothing(self) -> bool:
        adapter = self.adapter
        return adapter.kind != "none" and adapter.init_from is None and getattr(adapter, "init", None) != "pissa"

    @property
    def reference(self) -> Literal["model", "adapter_off", "cached"]:
        """How preferences get their reference, with `auto` decided."""
        assert isinstance(self.stage.objective, DPOConfig), "only preferences have one"
        if self.stage.objective.reference != "auto":
            return self.stage.objective.reference
        return "adapter_off" if self._adapter_starts_from_nothing else "model"

    @property
    def accumulation(self) -> int:
        """Micro-batches in one optimizer step, where the configuration fixes how large they are."""
        assert self.batch.micro_batch != "auto", "only the loop knows: it finds the largest that fits"
        return self.batch.tokens // (self.data.sequence_length * self.batch.micro_batch)
