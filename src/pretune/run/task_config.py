"""Configuration of the tasks other than training and evaluation: prepare, generate, report, export, plan, inspect."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

from pretune.compute import devices
from pretune.compute.interconnects import Interconnect
from pretune.core.config import Count, FilePath, Seconds, Section
from pretune.generation.config import DecodingConfig


class PrepareConfig(Section):
    show: Annotated[int, Field(ge=0)]
    """Number of documents of each set to print, with their loss mask."""


class GenerateConfig(DecodingConfig):
    prompt: str | None
    """Text to continue, or question to answer."""
    file: FilePath | None
    """File of prompts: lines of text, or JSON, CSV or Parquet with `prompt`, `messages` or the fields of the run's
    data."""
    output: FilePath | None
    """Output file (JSON lines) for the texts after a file's prompts; null writes to generated/ in the run's folder."""
    chat: bool
    """Chat with the model on the terminal instead."""
    system: str | None
    """System message of a chat, for templates that support it."""
    template: bool
    """Use the prompt format of the run's data (instruction, chat template...); false continues a prompt unchanged."""
    batch_size: Count
    """Number of a file's prompts continued at once."""
    compile: bool
    """Compile single-token decoding, for files: about a second per layer at the start, then faster."""
    runtime: Literal["pretune", "executorch"]
    """pretune runs the model itself; executorch runs a .pte from task=export with ExecuTorch's runtime, on the CPU, one
    text at a time."""
    export: FilePath | None
    """Folder of that .pte; null takes the run's most recent export."""

    @property
    def prompts_at_once(self) -> int:
        """The number of a file's prompts that are actually continued at once."""
        return 1 if self.runtime == "executorch" else self.batch_size

    @pydantic.model_validator(mode="after")
    def _programs_hold_one_text(self) -> Self:
        if self.runtime == "executorch" and self.num_beams > 1:
            raise ValueError("runtime = executorch holds one text at a time: set num_beams to 1")
        if self.runtime == "executorch" and self.compile:
            raise ValueError("runtime = executorch is compiled already: set compile to false")
        if self.runtime == "pretune" and self.export is not None:
            raise ValueError("export names a .pte, which only runtime = executorch can run: set runtime to executorch")
        return self

    @pydantic.model_validator(mode="after")
    def _one_source_of_prompts(self) -> Self:
        given = [name for name in ("prompt", "file", "chat") if getattr(self, name) not in (None, False)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: set one of them")
        return self


class ReportConfig(Section):
    runs: tuple[FilePath, ...]
    """Names or folders of the runs that task=report compares; an empty list reports on the configured run."""
    verify: bool
    """Check for each run whether it has learned (its validation loss fell by a fifth or more and, if it answers
    problems, it gets twice as many right as guessing would); exit with 1 if one has not."""
    after_training: bool
    """Write the report of a run when its training is complete."""


class ExportConfig(Section):
    format: Literal["huggingface", "integers", "executorch", "onnx"]
    """huggingface: a folder for transformers (config.json, model.safetensors, the tokenizer's files). integers:
    model.safetensors with the integers and scales of a quantized model, 4-bit integers packed two per byte. executorch:
    model.pte for phones, quantized according to `quantization`. onnx: model.onnx. Each comes with the tokenizer."""
    adapter: Literal["merge", "keep"]
    """For a run with an adapter: merge adds it to the weights; keep writes it alone, in peft's format, for use with the
    exported weights that it was trained on."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Dtype of the exported weights."""
    output: FilePath | None
    """Output folder, which must not exist yet; null takes export/<format>-<step> in the run's folder."""
    measure: bool
    """For a quantized model: measure the validation loss with and without rounding, and write both beside the files
    (quantization.json); this needs the run's data."""
    context: Annotated[int, Field(ge=32)] | None
    """For executorch: cache size of the file in tokens, prompt and answer together; null takes
    model.max_sequence_length."""

    @pydantic.model_validator(mode="after")
    def _runtimes_take_whole_models(self) -> Self:
        if self.format in ("huggingface", "integers"):
            return self
        if self.adapter == "keep":
            raise ValueError(f"format = {self.format} holds a whole model: set adapter to merge")
        if self.dtype != "float32":
            raise ValueError(
                f"format = {self.format} computes in float32: set dtype to float32; to make a phone's file small, use "
                "quantization=int8_int4"
            )
        return self


class PlanConfig(Section):
    device: str | None
    """Device to plan for, such as a100-40gb, h100 or rtx-4090; null takes this machine's, measured if unknown."""
    devices: Annotated[int, Field(ge=1, le=4096)]
    """Number of devices that share a step out; their kind of parallelism is parallel.kind."""
    interconnect: Interconnect
    """What joins them, the slowest part where there are several: nvlink3 (A100), nvlink4 (H100), nvlink5 (B200), pcie4;
    between machines of eight devices ib400, ib200 (an adapter per device), eth100, eth10 (one adapter)."""
    mfu: Annotated[float, Field(gt=0, le=1)]
    """Assumed model FLOPs utilization: the fraction of the device's peak that training reaches."""
    tokens_per_parameter: Annotated[float, Field(gt=0)]
    """Training tokens per parameter that count as compute-optimal."""
    finetune_tokens: Count
    """Tokens that fine-tuning reads, in the search for the largest model."""
    adapter_rank: Count
    """Rank of LoRA and QLoRA in that search; every matrix in the layers has an adapter."""
    tokens_per_second: Annotated[float, Field(gt=0)]
    """Minimum generation speed, one text at a time, that the search accepts for inference."""
    file: FilePath | None
    """File to also write the plan to, as JSON; null only prints it."""

    @pydantic.field_validator("device")
    @classmethod
    def _known(cls, device: str | None) -> str | None:
        return device if device is None else devices.named(device).name


class InspectConfig(Section):
    models: tuple[FilePath, ...]
    """Models to compare: runs, folders in Hugging Face's format, models on the hub (`owner/name` or
    `owner/name@revision`), and shapes with random weights, written as on the command line (`model=smollm_135m`)."""
    context: Count | None
    """Number of tokens that memory is estimated for: of one sequence in training, of one text in generation; null takes
    data.sequence_length."""
    device: str | None
    """Device that memory is estimated for, such as a100-40gb, rtx-4090, or a GPU's memory (16GiB); null takes this
    machine's."""
    on: FilePath | None
    """Run file, or config.yaml of a run, on whose data each model is measured and trained; other keys of the command
    line count for it too. null measures nothing."""
    seconds: Seconds
    """Training time of each model that is measured, in seconds or as text (5m)."""

    @pydantic.field_validator("device")
    @classmethod
    def _known(cls, device: str | None) -> str | None:
        return device if device is None else devices.named_or_sized(device).name
