"""RunConfig: every room's configuration on one page, and what must hold between rooms.

It stands between the rooms, whose sections it composes, and the verbs, which read it.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

from pretune import hardware
from pretune.adapters.config import AdapterConfig
from pretune.averaging import AveragingConfig
from pretune.checkpoint import CheckpointConfig
from pretune.config import Every, Section
from pretune.data.config import DataConfig
from pretune.generation.config import DecodingConfig
from pretune.model.config import ModelConfig
from pretune.objectives.config import DPOConfig, ObjectiveConfig
from pretune.optim.config import BudgetConfig, OptimizerConfig, ScheduleConfig
from pretune.precision import FLOAT8_MULTIPLE, PrecisionConfig
from pretune.quantization.config import QatConfig, QuantizationConfig, RoundingConfig, misfit_of_groups
from pretune.tracker.config import TrackerConfig

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
    tokens: Count
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


class GenerateConfig(DecodingConfig):
    prompt: str | None
    """Text to continue, or question to answer."""
    file: str | None
    """File of prompts: lines of text, or JSON lines with `prompt`, `messages` or the fields of the run's data."""
    output: str | None
    """Where the texts after a file's prompts go, as JSON lines; null takes generated/ in the run's folder."""
    chat: bool
    """Talk to the model on the terminal instead."""
    system: str | None
    """What a chat begins with, for templates that have a place for it."""
    template: bool
    """Put a prompt as the run's data puts a question (instruction, chat template...); false continues it as it is."""
    batch: Count
    """Prompts of a file that are continued at once."""
    compile: bool
    """Compile the step for one token, for files: a second or so for each layer at the start, then faster."""
    runtime: Literal["pretune", "executorch"]
    """What computes: the model itself, or a .pte of task=export by ExecuTorch's runtime, on the CPU, one text at a
    time."""
    export: str | None
    """Folder of that .pte; null takes the one of the run that was exported last."""

    @property
    def rows(self) -> int:
        """Prompts of a file that are really continued at once."""
        return 1 if self.runtime == "executorch" else self.batch

    @pydantic.model_validator(mode="after")
    def _programs_hold_one_text(self) -> Self:
        if self.runtime == "executorch" and self.num_beams > 1:
            raise ValueError("runtime = executorch holds one text at a time: set num_beams to 1")
        if self.runtime == "executorch" and self.compile:
            raise ValueError("runtime = executorch is compiled already: set compile to false")
        if self.runtime == "pretune" and self.export is not None:
            raise ValueError("export names a .pte, which runtime = executorch runs: set runtime to executorch")
        return self

    @pydantic.model_validator(mode="after")
    def _one_source_of_prompts(self) -> Self:
        given = [name for name in ("prompt", "file", "chat") if getattr(self, name) not in (None, False)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: set one of them")
        return self


class ReportConfig(Section):
    runs: tuple[str, ...]
    """Names or folders of the runs that task=report compares; none reports on the run that the config names."""


class ExportConfig(Section):
    format: Literal["huggingface", "integers", "executorch", "onnx"]
    """huggingface: a folder that transformers loads (config.json, model.safetensors, the tokenizer's files). integers:
    model.safetensors with the integers and scales of a quantized model, two of 4 bits in a byte. executorch: model.pte
    for phones, as `quantization` stores it. onnx: model.onnx. The tokenizer is beside each."""
    adapter: Literal["merge", "keep"]
    """Of a run with an adapter: merge adds it to the weights; keep writes it alone, as peft's folder, for the exported
    weights that it was trained on."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Type of the exported numbers."""
    output: str | None
    """Folder to write, which must not exist yet; null takes export/<format>-<step> in the run's folder."""
    measure: bool
    """Of a quantized model, measure the validation loss with and without its rounding, and write both beside the files
    (quantization.json); it takes the run's data."""
    context: Annotated[int, Field(ge=32)] | None
    """Of executorch: tokens of prompt and answer together that the file sets memory aside for; null takes
    model.max_sequence_length."""

    @pydantic.model_validator(mode="after")
    def _runtimes_take_whole_models(self) -> Self:
        if self.format in ("huggingface", "integers"):
            return self
        if self.adapter == "keep":
            raise ValueError(f"format = {self.format} holds a whole model: set adapter to merge")
        if self.dtype != "float32":
            raise ValueError(
                f"format = {self.format} computes in float32: set dtype to float32; what makes a phone's file small is "
                "quantization=int8_int4"
            )
        return self


class PlanConfig(Section):
    device: str | None
    """Device to plan for, such as a100-40gb, h100 or rtx-4090; null takes the one at hand, measured if unknown."""
    mfu: Annotated[float, Field(gt=0, le=1)]
    """Share of the device's peak that training is assumed to reach (model FLOPs utilization)."""
    tokens_per_parameter: Annotated[float, Field(gt=0)]
    """Training tokens per parameter that count as compute-optimal."""
    finetune_tokens: Count
    """Tokens that a fine-tuning reads, in the search for the biggest model."""
    adapter_rank: Count
    """Rank of LoRA and QLoRA in that search; every matrix of the layers has an adapter."""
    tokens_per_second: Annotated[float, Field(gt=0)]
    """Slowest generation, one text at a time, that the search accepts for inference."""
    file: str | None
    """Where to write the plan as JSON too; null prints only."""

    @pydantic.field_validator("device")
    @classmethod
    def _known(cls, device: str | None) -> str | None:
        return device if device is None else hardware.named(device).name


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._=,+-]*$")]
    """The run's name and the name of its folder in output_dir."""
    task: Literal["train", "prepare", "evaluate", "generate", "export", "report", "plan"]
    """What to do."""
    seed: int
    """Weights, order of the data and dropout."""
    device: Literal["auto", "cpu", "cuda", "mps"]
    """Where to compute; auto takes a GPU if there is one."""
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
