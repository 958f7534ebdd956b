"""Stand-ins for models on the hub, with their tokenizers, and small data for run files that start from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from hub_models import reference
from preference_data import write_preferences
from published import model_folder

from pretune.launch.groups import CONFIGS

RUNS = CONFIGS / "run"
FAMILIES = {
    "llama": ("llama 3.1", "llama3"),
    "qwen2": ("qwen2", "qwen2"),
    "gemma2": ("gemma2", "gemma"),
    "gpt2": ("gpt2", "gpt2"),
}
"""A case of hub_models and the tokenizer of a family, by model_type."""
VOCABULARY = 448
"""More than any tokenizer here has: the embedding has rows without a token, as published models have."""

TINY = (
    "device=cpu",
    "threads=1",
    "precision=fp32",
    "precision.compile=false",
    "data.sequence_length=192",
    "data.num_workers=1",
    "batch.tokens=384",
    "batch.micro_batch=2",
    "evaluation.micro_batch=2",
    "evaluation.at_start=false",
    "budget.steps=2",
    "evaluation.every=2",
    "checkpoint.every=2",
)
"""Overrides with which any run file takes seconds."""
MATHQA = (
    "data/source=files",
    "data.source.files=[mathqa.jsonl]",
    "data/source@data.validation.source=files",
    "data.validation.source.files=[held_out.jsonl]",
)
CHATS = ("data/source=files", "data.source.files=[chats.jsonl]", "data.validation.fraction=0.2")
ALPACA = ("data/source=files", "data.source.files=[alpaca.jsonl]", "data.validation.fraction=0.2")
PREFERENCES = ("stage=dpo", "data=ultrafeedback", "data/source=files", "data.source.files=[pairs.jsonl]",
               "data.validation.fraction=0.2", "data.sequence_length=384", "batch.tokens=768")  # fmt: skip


def stand_in(folder: Path, case: str, tokenizer: str, template: bool = True, **changes: Any) -> Path:
    """A model of transformers with random weights, in a folder as its publishers would write it; without a chat
    template, as base models are, if not `template`."""
    model_folder(folder, tokenizer)
    if case.startswith("qwen2"):
        _split_as_qwen2(folder / "tokenizer.json")
    ends = (folder / "generation_config.json").read_text()
    positions = "n_positions" if case.startswith("gpt2") else "max_position_embeddings"
    reference(case, **{"vocab_size": VOCABULARY, positions: 512, **changes}).save_pretrained(folder)
    (folder / "generation_config.json").write_text(ends)
    if not template:
        about = json.loads((folder / "tokenizer_config.json").read_text())
        about.pop("chat_template", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def _split_as_qwen2(path: Path) -> None:
    """transformers gives each model of this family Qwen2's own pre-tokenizer, so published ones have it."""
    content, theirs = json.loads(path.read_text()), json.loads(transformers.Qwen2Tokenizer().backend_tokenizer.to_str())
    path.write_text(json.dumps(content | {key: theirs[key] for key in ("normalizer", "pre_tokenizer")}))


def write_data(folder: Path) -> None:
    """The files that MATHQA, CHATS, ALPACA and PREFERENCES name."""
    for name, numbers in (("mathqa", range(20)), ("held_out", range(20, 26))):
        _write(folder / f"{name}.jsonl", [_problem(number) for number in numbers])
    _write(
        folder / "chats.jsonl",
        [{"messages": [{"role": "user", "content": f"{n} cats?"}, {"role": "assistant", "content": f"{n} dogs."}]}
         for n in range(30)],
    )  # fmt: skip
    _write(
        folder / "alpaca.jsonl",
        [{"instruction": f"Count {n} cats.", "input": "", "output": f"They are {n}."} for n in range(30)],
    )
    write_preferences(folder / "pairs.jsonl")


def _problem(number: int) -> dict[str, str]:
    options = ", ".join(f"{letter} ) {number + plus}" for plus, letter in enumerate("abcde"))
    return {"Problem": f"what is {number} + 1 ?", "Rationale": "add", "options": options, "correct": "b"}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
