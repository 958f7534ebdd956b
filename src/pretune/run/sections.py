"""Configuration sections that belong to no other package: stage, batch, evaluation and samples."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

from pretune.core.config import MAY_DIFFER, Count, Every, FilePath, Seconds, Section
from pretune.data.formats.grid_config import AugmentConfig
from pretune.data.sources.config import LongTaskSource
from pretune.generation.config import DecodingConfig
from pretune.objectives.config import ObjectiveConfig


class StageConfig(Section):
    kind: Literal["pretrain", "finetune", "dpo", "distill"]
    """Stage of training; also wandb's job_type. All stages use the same loop."""
    init_from: Annotated[FilePath | None, MAY_DIFFER]
    """Weights to start from: a run's name or folder, the folder of a model in Hugging Face's format, or `owner/name` or
    `owner/name@revision` on the hub; null starts from random weights. A resume may name another place of the same
    weights."""
    objective: ObjectiveConfig
    """The training objective."""

    @pydantic.model_validator(mode="after")
    def _finetune_needs_a_start(self) -> Self:
        if self.kind == "finetune" and self.init_from is None:
            raise ValueError("fine-tuning needs weights to start from: set init_from to a run or a model")
        if self.kind == "dpo" and self.init_from is None:
            raise ValueError("DPO compares the model with the one that it starts from: set init_from to a run")
        return self

    @pydantic.model_validator(mode="after")
    def _each_has_its_objective(self) -> Self:
        if self.kind not in self.objective.stages:
            stage = self.kind if self.kind in ("dpo", "distill") else self.objective.stages[0]
            raise ValueError(
                f"kind = {self.kind} with objective.kind = {self.objective.kind}: choose both by stage={stage}"
            )
        return self


class BatchWarmupConfig(Section):
    start: Count
    """Input tokens of the first step; it must divide batch.tokens and be a multiple of sequence_length *
    micro_batch."""
    over: Count
    """Input tokens over which steps grow linearly from `start` to batch.tokens, in multiples of `start`."""


class BatchConfig(Section):
    tokens: Annotated[int, Field(ge=1, le=2**28)]
    """Input tokens per optimizer step, over all ranks; a multiple of sequence_length * micro_batch."""
    micro_batch: Annotated[Count | Literal["auto"], MAY_DIFFER]
    """Sequences per forward and backward pass; gradients are accumulated over the batch. auto takes as many as fit into
    memory, and fewer if memory runs out. It affects only memory, speed and the last bits of sums."""
    warmup: BatchWarmupConfig | None
    """Smaller batches at the start, when gradients agree and a large batch is wasted; null keeps the size constant."""

    @pydantic.model_validator(mode="after")
    def _start_divides(self) -> Self:
        if self.warmup is not None and self.tokens % self.warmup.start:
            raise ValueError(
                f"tokens ({self.tokens}) is not a multiple of warmup.start ({self.warmup.start}), by which steps grow"
            )
        return self

    @property
    def micro_batch_size(self) -> int:
        """Sequences per micro-batch; for auto, the minimum."""
        return 1 if self.micro_batch == "auto" else self.micro_batch

    @property
    def smallest(self) -> int:
        """Tokens of the smallest step; the size of every step is a multiple of it."""
        return self.tokens if self.warmup is None else self.warmup.start

    def tokens_after(self, read: int) -> int:
        """Tokens of the next step after `read` tokens."""
        if self.warmup is None or read >= self.warmup.over:
            return self.tokens
        grown = (self.tokens - self.warmup.start) * read // self.warmup.over
        return self.warmup.start * (1 + grown // self.warmup.start)


class AnswersConfig(DecodingConfig):
    measure: bool
    """Generate answers to held-out problems and count the right ones, for formats with answers."""
    batch_size: Annotated[Count, MAY_DIFFER]
    """Number of problems answered at once; it affects only speed."""
    compile: Annotated[bool, MAY_DIFFER]
    """Compile single-token decoding in task=evaluate: about a second per layer at the start, then faster."""


class RetrievalConfig(Section):
    source: LongTaskSource
    """The task and the text around; its lengths, depths and number of examples are those of the cells below."""
    lengths: Annotated[tuple[Annotated[int, Field(ge=64)], ...], Field(min_length=1)]
    """Lengths of prompts, in tokens."""
    depths: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)]
    """Where in the text the answer lies, as shares of it."""
    examples: Count
    """Number of examples for each length and depth."""
    max_new_tokens: Count
    """Tokens that the model may write."""
    batch_size: Annotated[Count, MAY_DIFFER]
    """Number of prompts answered at once; it affects only speed and memory."""


class TrainEachConfig(Section):
    """Training on the pairs of one task at a time, before it is answered. The evaluated model stays as it is."""

    steps: Annotated[int, Field(ge=0)]
    """Steps on a task's own pairs; 0 turns it off."""
    seconds: Seconds
    """Time for one task, in seconds or as text (30s): no step begins after it."""
    batch_size: Count
    """Examples per step."""
    lr: Annotated[float, Field(gt=0)]
    """Learning rate, which stays the same; the other keys are those of the run's optimizer."""
    augment: AugmentConfig
    """Variants of each example: one of the pairs after all others."""


class ArcConfig(DecodingConfig):
    batch_size: Annotated[Count, MAY_DIFFER]
    """Number of texts generated at once; it affects only speed."""
    samples: Annotated[int, Field(ge=0)]
    """Number of answers that are sampled for each test, at `temperature`; 0 for none. The first answer never is."""
    votes: AugmentConfig
    """Variants in which a test is asked: the answer found most often wins, after each is changed back."""
    train_each: TrainEachConfig
    """Training on each task's own pairs before it is answered once more, only in task=evaluate."""

    @pydantic.model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.samples and self.temperature == 0:
            raise ValueError("samples at temperature 0 are all the same: raise temperature, or set samples to 0")
        if self.num_beams > 1:
            raise ValueError("num_beams must be 1: several answers come from samples and votes")
        return self


class EvaluationConfig(Section):
    every: Annotated[Every, MAY_DIFFER]
    """Steps between evaluations; null evaluates only at the end."""
    at_start: bool
    """Also evaluate before the first step."""
    micro_batch: Annotated[Count, MAY_DIFFER]
    """Number of sequences evaluated at once."""
    option_accuracy: bool
    """Measure multiple-choice accuracy by likelihood, for formats with options."""
    max_problems: Count | None
    """Maximum number of problems for option accuracy and answers, and of tasks; null takes the whole validation set."""
    answers: AnswersConfig
    """Generated answers to held-out problems."""
    retrieval: RetrievalConfig | None
    """Answers to tasks in long texts, by the length of the text and by where in it the answer lies; null asks none."""
    arc: ArcConfig | None
    """Answers to held-out tasks of grids, compared cell by cell: evaluation=arc; null measures none."""


class SamplesConfig(DecodingConfig):
    every: Every
    """Steps between samples; null samples only at the end."""
    prompts: tuple[str, ...]
    """Texts to continue, or questions to answer; an empty list turns sampling off."""
    template: bool
    """Use the prompt format of the run's data (instruction, chat template...); false continues a prompt unchanged."""
