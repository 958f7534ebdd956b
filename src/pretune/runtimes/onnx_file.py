"""Export a model to ONNX, without a cache: from token ids to the logits of every position.

B rows, T tokens, V token ids.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretune.core.config import ConfigError
from pretune.core.quiet import quiet

OPSET = 18
"""Version of the ONNX operator set."""


def check_onnx_installed() -> None:
    """Raise ConfigError if a package for ONNX export is missing."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"ONNX files need {', '.join(missing)}, not installed here: pip install -r req-phone.txt")


class _Logits(nn.Module):
    """tokens [B, T] -> logits [B, T, V] of the tokenizer's ids."""

    def __init__(self, model: nn.Module, vocab_size: int) -> None:
        super().__init__()
        self.model, self.vocab_size = model, vocab_size

    def forward(self, tokens: Tensor) -> Tensor:
        model: Any = self.model
        return model.unembed(model(tokens))[..., : self.vocab_size]


def write_onnx(model: nn.Module, vocab_size: int, path: Path) -> None:
    """Write a float32 transformer in evaluation mode on the CPU: `tokens` [B, T] int64 -> `logits` [B, T, V], for any
    number of rows and any length up to the model's maximum."""
    check_onnx_installed()
    config: Any = model.config
    rows = torch.export.Dim("rows", min=1)
    length = torch.export.Dim("length", min=1, max=config.max_sequence_length)
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            _Logits(model, vocab_size),
            (torch.ones(2, 3, dtype=torch.int64),),
            dynamo=True,
            input_names=["tokens"],
            output_names=["logits"],
            dynamic_shapes={"tokens": {0: rows, 1: length}},
            opset_version=OPSET,
            verbose=False,
        )
        assert program is not None
        program.save(path)


def onnx_logits(path: Path, tokens: Tensor) -> Tensor:
    """Logits [B, T, V] of tokens [B, T], computed by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"tokens": tokens.numpy()})
    return torch.from_numpy(logits)
