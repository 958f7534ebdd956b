"""Export a model as integers in a safetensors file, and measure the cost of quantization."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pretune.core.files import write_json
from pretune.run.assembly import assemble_evaluation
from pretune.run.config import RunConfig
from pretune.run.folder import RunFolder
from pretune.run.model import converted_model, merged_model
from pretune.run.tokenizer import assemble_tokenizer
from pretune.tasks.evaluate.task import validation_loss
from pretune.tasks.export.beside import what_ends_a_text, write_tokenizer

WEIGHTS, INDEX = "model.safetensors", "integers.json"


def write_integers(config: RunConfig, run: RunFolder, folder: Path) -> str:
    """Write model.safetensors, integers.json and the tokenizer; return instructions for use.

    A matrix NAME.weight [E, D] that is stored as integers becomes NAME.weight.integers [E, D] int8, or [E, D / 2] uint8
    with two 4-bit integers per byte (the first in the low half, 8 added to each), and NAME.weight.scales [E, G]. Other
    tensors have export.dtype. A tied head is not written twice.
    """
    model, tensors, matrices = converted_model(config, run, torch.device("cpu")), {}, {}
    for name, tensor in model.named_parameters():
        if name == "head.weight" and config.model.tied_embeddings:
            continue
        if type(tensor.data) is Tensor:
            tensors[name] = tensor.detach().to(getattr(torch, config.export.dtype)).contiguous()
            continue
        stored: Any = tensor.data
        group, bits = stored.block_size[1], int(str(stored.target_dtype).removeprefix("torch.int"))
        tensors[f"{name}.integers"] = _in_bytes(stored.qdata, bits)
        # Scales of groups are already rounded to bfloat16; see quantization.rounding.
        tensors[f"{name}.scales"] = stored.scale.to(torch.bfloat16 if group < tensor.shape[1] else torch.float32)
        rounds = stored.activation_quantization is not None
        matrices[name] = {"bits": bits, "group_size": group, "shape": list(tensor.shape), "rounds_inputs": rounds}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    section = config.quantization.model_dump()
    tokenizer = assemble_tokenizer(config)
    about = {"quantization": section, "model": config.model.model_dump(), **what_ends_a_text(config, tokenizer)}
    write_json(folder / INDEX, {**about, "matrices": matrices})
    write_tokenizer(config, tokenizer, folder)
    size = (folder / WEIGHTS).stat().st_size / 2**20
    return f"{size:,.1f} MiB; {INDEX} says how each matrix is stored, docs/how-to/quantization.md how to read it."


def cost_of_quantization(config: RunConfig, run: RunFolder) -> dict[str, float]:
    """The validation loss of a run's model with weights rounded according to `quantization`, and without rounding."""
    parts = assemble_evaluation(config, run)
    rounded = validation_loss(config, parts)
    whole = replace(parts, model=merged_model(config, run, parts.device))
    return {"val/loss": rounded, "val_float/loss": validation_loss(config, whole)}


def _in_bytes(integers: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return integers.contiguous()
    pairs = (integers + 8).to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)
