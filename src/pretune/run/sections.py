"""Sections of a run that belong to no room: its stage, its batches, its evaluation and samples."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

from pretune.core.config import MAY_DIFFER, Count, Every, Section
from pretune.generation.config import DecodingConfig
from pretune.objectives.config import ObjectiveConfig


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
    def micro_batch_size(self) -> int:
        """Sequences of a micro-batch; where they are chosen later, the fewest."""
        return 1 if self.micro_batch == "auto" else self.micro_batch

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
    batch_size: Annotated[Count, MAY_DIFFER]
    """Problems that are answered at once; it changes nothing but speed."""
    compile: Annotated[bool, MAY_DIFFER]
    """Compile the step for one token, in task=evaluate: a second or so for each layer at the start, then faster."""


class EvaluationConfig(Section):
    every: Annotated[Every, MAY_DIFFER]
    """Steps between evaluations; null evaluates only at the end."""
    at_start: bool
    """Evaluate before the first step too."""
    micro_batch: Annotated[Count, MAY_DIFFER]
    """Sequences that are evaluated at once."""
    option_accuracy: bool
    """Multiple-choice accuracy by likelihood, for formats that have options."""
    max_problems: Count | None
    """Problems for option accuracy and answers; null takes the whole validation set."""
    answers: AnswersConfig
    """Answers that the model writes itself."""


class SamplesConfig(DecodingConfig):
    every: Every
    """Steps between samples; null samples only at the end."""
    prompts: tuple[str, ...]
    """Texts to continue, or questions to answer; none switches sampling off."""
    template: bool
    """Put a prompt as the run's data puts a question (instruction, chat template...); false continues it as it is."""
