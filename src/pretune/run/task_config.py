"""Sections of the tasks other than training and evaluation: prepare, generate, report, export, plan."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

from pretune.compute import devices
from pretune.core.config import Count, Section
from pretune.generation.config import DecodingConfig


class PrepareConfig(Section):
    show: Annotated[int, Field(ge=0)]
    """Documents of each set to print, with their loss mask."""


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
    batch_size: Count
    """Prompts of a file that are continued at once."""
    compile: bool
    """Compile the step for one token, for files: a second or so for each layer at the start, then faster."""
    runtime: Literal["pretune", "executorch"]
    """What computes: the model itself, or a .pte of task=export by ExecuTorch's runtime, on the CPU, one text at a
    time."""
    export: str | None
    """Folder of that .pte; null takes the one of the run that was exported last."""

    @property
    def prompts_at_once(self) -> int:
        """Prompts of a file that are really continued at once."""
        return 1 if self.runtime == "executorch" else self.batch_size

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
    verify: bool
    """Say of each run whether it has learned (its validation loss fell by a fifth or more, and it gets twice as many
    problems right as guessing would, where it answers any), and exit with 1 where one has not."""


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
        return device if device is None else devices.named(device).name
