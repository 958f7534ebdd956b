"""Data sections and small tokenizers for the tests of `data`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from pretune.core.config import validate
from pretune.data.config import DataConfig
from pretune.data.formats.formatter import Formatter
from pretune.data.formats.segments import ColumnCheck, Place, Unusable
from pretune.data.formats.special_tokens import TemplateTokens
from pretune.data.tokenizer import TRAINED_EOS, Tokenizer, train_byte_level

FORMATS = Path(__file__).parents[2] / "src" / "config" / "data" / "format"

_BASE: dict[str, Any] = {
    "source": {"kind": "word_problems", "num_problems": 300, "max_number": 20, "seed": 1},
    "validation": {"source": None, "fraction": 0.2, "seed": 3, "group_by": None},
    "format": {"kind": "text", "column": "text"},
    "tokenizer": {"kind": "trained", "vocab_size": 300, "max_bytes": 10_000, "split_digits": True, "add_tokens": []},
    "sequence_length": 16,
    "packing": {"mode": "stream", "too_long": "split", "isolate": False},
    "shuffle": True,
    "mix": {},
    "num_workers": 2,
}

MATHQA = {"kind": "mathqa", "options": True, "rationale": "none", "score_prompt": False}

TOKENS = TemplateTokens(None, "", TRAINED_EOS, (TRAINED_EOS,))
"""The special tokens that a tokenizer trained for the run offers a chat template."""

CHAT: dict[str, Any] = {
    "kind": "chat", "columns": ["messages", "conversations"], "role_keys": ["role", "from"],
    "content_keys": ["content", "value"],
    "roles": {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"},
    "template": None, "variables": {}, "assistant_turns": "together",
}  # fmt: skip


def data_config(**changes: Any) -> DataConfig:
    """A data section with changes; a mapping changes only the keys it names, unless it has a `kind`."""
    merged = dict(_BASE)
    for key, value in changes.items():
        partial = isinstance(value, dict) and "kind" not in value
        merged[key] = merged[key] | value if partial else value
    merged["format"] = with_defaults(merged["format"])
    merged["mix"] = {name: part | {"format": with_defaults(part["format"])} for name, part in merged["mix"].items()}
    return validate(DataConfig, merged)


def with_defaults(format: dict[str, Any]) -> dict[str, Any]:
    """A format section with the values of its YAML group for the keys that it does not name."""
    kind = format["kind"]
    defaults = yaml.safe_load((FORMATS / f"{kind}.yaml").read_text())
    if "common@_here_" in str(defaults.pop("defaults", "")):
        defaults = yaml.safe_load((FORMATS / "common" / "messages.yaml").read_text()) | defaults
    found = defaults | format
    return found | {"template": with_defaults(found["template"])} if kind == "preference" else found


def error_of_every_row(formatter: Formatter, row: dict[str, Any], place: Place) -> None:
    """Raise what preparation raises if every row of a source is like this one."""
    columns = ColumnCheck()
    try:
        formatter.documents(row, place)
    except Unusable as reason:
        columns.add(reason)
    columns.end()


def files(*names: Path | str, **other: Any) -> dict[str, Any]:
    """A `files` source."""
    return {"kind": "files", "files": [str(name) for name in names], "format": "auto", "max_rows": None} | other


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    """A JSON-lines file of these records."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def byte_tokenizer(vocab_size: int = 257, texts: Iterable[str] = ("a",)) -> Tokenizer:
    """A byte-level tokenizer; with 257 tokens every byte is a token, and 0 is EOS."""
    return Tokenizer(train_byte_level(iter(texts), vocab_size, False), TRAINED_EOS)


def sentencepiece_tokenizer(scheme: str = "prepend", texts: Iterable[str] = ("a",)) -> Tokenizer:
    """A tokenizer like Llama 2's, with byte fallback, that puts a space before a text (`scheme`: prepend, or a scheme
    of Metaspace), and a BOS before what clients encode."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["<unk>", "<s>", "</s>", "<|end|>"]
    learner = Backend(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False, special_tokens=special)
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    tokens = sorted(learned["vocab"], key=learned["vocab"].get)
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *tokens[len(special) :], "##", "<0x0A>x"]
    model = models.BPE(
        {token: number for number, token in enumerate(tokens)},
        [*map(tuple, learned["merges"])],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    backend = Backend(model)
    if scheme == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(special)
    return Tokenizer(backend, "</s>", "<s>")


def write_texts(folder: Path, texts: Iterable[str], name: str = "texts.jsonl") -> Path:
    """A JSON-lines file with a `text` each."""
    return write_lines(folder / name, ({"text": text} for text in texts))
