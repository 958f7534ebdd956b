"""Export a model as a single file for a runtime: ExecuTorch's .pte, or ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretune.core.config import ConfigError
from pretune.core.progress_bar import counted
from pretune.data.tokenizer import Tokenizer
from pretune.model.build import Model
from pretune.run.config import RunConfig
from pretune.run.endings import run_endings
from pretune.run.folder import RunFolder
from pretune.run.model import converted_model, merged_model
from pretune.run.tokenizer import assemble_tokenizer
from pretune.runtimes.agreement import PROMPT, largest_difference, probe, program_logits
from pretune.runtimes.executorch.lowering import STAGES, Interface, check_installed, lower
from pretune.runtimes.executorch.program import Program
from pretune.runtimes.manifest import PROGRAM, write_manifest
from pretune.runtimes.onnx_file import check_onnx_installed, onnx_logits, write_onnx
from pretune.tasks.export.beside import what_ends_a_text, write_tokenizer

ONNX = "model.onnx"

LEAST = 32
"""Minimum of a model's positions and of export.context for an export to be useful."""


def write_program(config: RunConfig, run: RunFolder, step: int, folder: Path) -> str:
    """Write model.pte, the tokenizer and pretune.json; return instructions for use.

    Raises ConfigError for layers that XNNPACK does not support, RuntimeError if the file's logits differ from the
    model's.
    """
    check_installed()
    tokenizer = assemble_tokenizer(config)
    context = _context(config)
    model = converted_model(config, run, torch.device("cpu"))
    interface = Interface(context, tokenizer.vocab_size, tuple(sorted(run_endings(config, tokenizer).ids)))
    tokens = probe(tokenizer.vocab_size, min(PROMPT + 4, context - 1))
    expected = logits(model, tokens, tokenizer)[PROMPT - 1 : -1]
    for _ in counted(lower(model, interface, folder / PROGRAM), "lowering to ExecuTorch", STAGES):
        pass
    found = program_logits(Program(folder / PROGRAM), tokens)
    difference = largest_difference(found, expected, PROGRAM)
    about = {"context": context, "largest_difference": difference}
    _write_beside(config, run, step, folder, PROGRAM, tokenizer, about)
    return (
        f"{_described(folder / PROGRAM, difference)} Generate with it: python src/main.py --config {run.config} "
        "task=generate generate.runtime=executorch 'generate.export={output}' 'generate.prompt=...'"
    )


def write_onnx_file(config: RunConfig, run: RunFolder, step: int, folder: Path) -> str:
    """Write model.onnx, the tokenizer and pretune.json; return instructions for use."""
    check_onnx_installed()
    if config.quantization.kind not in ("none", "qlora_nf4"):
        raise ConfigError(
            f"ONNX export supports only float32: use export.format=executorch with "
            f"quantization={config.quantization.kind}, or quantization=none for ONNX"
        )
    tokenizer = assemble_tokenizer(config)
    model = merged_model(config, run, torch.device("cpu")).eval()
    write_onnx(model, tokenizer.vocab_size, folder / ONNX)
    tokens = probe(tokenizer.vocab_size, min(16, config.model.max_sequence_length))
    difference = largest_difference(onnx_logits(folder / ONNX, tokens)[0], logits(model, tokens, tokenizer), ONNX)
    _write_beside(config, run, step, folder, ONNX, tokenizer, {"largest_difference": difference})
    return (
        f"{_described(folder / ONNX, difference)} Load it: onnxruntime.InferenceSession('{{output}}/{ONNX}'); "
        "tokens [rows, length] go in, logits [rows, length, vocabulary] come out"
    )


def logits(model: Model, tokens: Tensor, tokenizer: Tokenizer) -> Tensor:
    """The model's own logits [T, V] of tokens [1, T]."""
    with torch.no_grad():
        return model.unembed(model(tokens))[0, :, : tokenizer.vocab_size]


def _context(config: RunConfig) -> int:
    limit, wanted = config.model.max_sequence_length, config.export.context
    if limit < LEAST:
        raise ConfigError(f"model.max_sequence_length = {limit} is too small to export: it must be at least {LEAST}")
    if wanted is not None and wanted > limit:
        raise ConfigError(
            f"export.context ({wanted}) exceeds the model's number of positions (model.max_sequence_length = "
            f"{limit}); lower it, or set it to null"
        )
    return limit if wanted is None else wanted


def _write_beside(
    config: RunConfig, run: RunFolder, step: int, folder: Path, file: str, tokenizer: Tokenizer, about: dict[str, Any]
) -> None:
    write_tokenizer(config, tokenizer, folder)
    of = {"run": run.name, "step": step, "quantization": config.quantization.kind, "vocab_size": tokenizer.vocab_size}
    of |= what_ends_a_text(config, tokenizer)
    write_manifest(folder, file, tokenizer.fingerprint, of | about)


def _described(path: Path, difference: float) -> str:
    size = path.stat().st_size
    return f"{path.name} has {size / 1e6:,.1f} MB; its logits differ from the model's by at most {difference:.1e}."
