"""A run file that starts from a model of others, and the folder of such a model with its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

_RUN = """\
# @package _global_
defaults:
  - /base
  - override /data: files
  - override /data/tokenizer@data.tokenizer: inherited
  - override /stage: finetune
  - override /adapter: ADAPTER
  - _self_
name: tuned
data: {source: {files: [TEXTS]}, sequence_length: 64, validation: {fraction: 0.2}, num_workers: 1}
precision: {compute: float32, compile: false}
device: cpu
"""


def write_run(path: Path, texts: str | Path, keys: str, adapter: str = "none") -> None:
    """Write a run file that fine-tunes on `texts` with the start's own tokenizer, in float32; `keys`: more YAML."""
    path.write_text(_RUN.replace("TEXTS", str(texts)).replace("ADAPTER", adapter) + keys)


def save_with_tokenizer(model: Any, folder: Path, backend: tokenizers.Tokenizer) -> None:
    """Save one of transformers' models as its publishers would, with a tokenizer trained here."""
    model.save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    about = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
