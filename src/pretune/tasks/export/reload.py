"""Load an exported folder as its users will, with transformers, and compare it with the run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from pretune.core.config import ConfigError, UserError
from pretune.core.quiet import no_progress_bar, quiet
from pretune.data.formats.build import build_formatter
from pretune.data.formats.documents import documents
from pretune.data.formats.segments import Segment
from pretune.data.tokenizer import Tokenizer
from pretune.model.build import Model
from pretune.run.config import RunConfig

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.02, "float16": 0.02}
"""Maximum difference of losses, in nats per token. Weights in 16 bits are rounded after features are folded in."""

_DOCUMENTS, _CHARACTERS, _TOKENS = 4, 4_000, 512
"""Number of validation documents to compare, of characters of each, and of tokens that the models read."""

_TEXTS = (
    "In 1984, 12,345.67 people paid 3 x 100 = 300; they'll say it's WE'D or \"I'M\".",
    "  two spaces at both ends  ",
    "\n\n\tdef f(x):\r\n        return x  # tab, CRLF and spaces\n\n\n",
    "Ünïcödé cafe\u0301 \ufb01ne 日本語 한국어 العربية 🎉👩\u200d👩\u200d👧 \u00a0\u200b\ufeff½ Ⅳ",
    "▁ <0x0A> ## </w> Ġ [UNK] <unk> <s> </s> [INST] <|endoftext|> <|im_start|>",
)
"""Texts that tokenizers are known to differ on."""


def check_tokenizer(config: RunConfig, tokenizer: Tokenizer, folder: Path) -> list[list[int]]:
    """Compare transformers' AutoTokenizer on `folder` with the run's tokenizer, on validation documents and on texts
    that are hard to tokenize; return the ids of each of these documents and texts.

    Text that spells a special token is compared both ways: as that token, as transformers reads it, and as text, as
    training does. Raises ConfigError where ids differ.
    """
    from transformers import AutoTokenizer

    with quiet():
        theirs: Any = AutoTokenizer.from_pretrained(folder)
    special = list(tokenizer.special_tokens.values())[:32]
    texts = [*_validation_texts(config, tokenizer), *_TEXTS, "".join(f" a{token} b{token}" for token in special)]
    for text in texts:
        for parsed in (False, True):
            # transformers puts a BOS before any text, also before one that begins with it.
            wanted = [*tokenizer.beginning, *tokenizer.encode_segments([Segment(text, False, parsed)])[0]]
            found = theirs(text, split_special_tokens=not parsed)["input_ids"]
            if found != wanted:
                raise ConfigError(_difference(text, found, wanted))
    return [[*tokenizer.beginning, *tokenizer.encode(text)] for text in texts]


def check_model(model: Model, ids: Sequence[Sequence[int]], folder: Path, dtype: str) -> None:
    """Compare the loss of transformers' model from `folder`, whose weights are stored as `dtype`, with that of `model`,
    which is rounded to them. RuntimeError if they differ by more than rounding explains."""
    from transformers import AutoModelForCausalLM

    limit = min(_TOKENS, model.config.max_sequence_length)
    rows = [torch.tensor([row[:limit]]) for row in ids if len(row) > 1]
    model = model.to(getattr(torch, dtype)).to(torch.float32).eval()
    with torch.no_grad():
        wanted = _loss(rows, [model.unembed(model(row)) for row in rows])
        with quiet(), no_progress_bar():
            theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        found = _loss(rows, [theirs.eval()(row).logits for row in rows])
    both_diverged = not math.isfinite(found) and not math.isfinite(wanted)
    if not abs(found - wanted) <= TOLERANCE[dtype] and not both_diverged:
        raise RuntimeError(
            f"transformers computes a loss of {found:.4f} from the exported files, the run {wanted:.4f}: nothing was "
            "exported; this is a bug in Pretune or in transformers, please report it with the run's config.yaml"
        )


def _loss(rows: Sequence[torch.Tensor], logits: Sequence[torch.Tensor]) -> float:
    """The mean loss of each token of rows [1, T] but the first, in nats, from logits [1, T, V]."""
    losses = [F.cross_entropy(one[0, :-1], row[0, 1:], reduction="none") for row, one in zip(rows, logits, strict=True)]
    return float(torch.cat(losses).mean())


def _validation_texts(config: RunConfig, tokenizer: Tokenizer) -> Iterator[str]:
    """The first validation documents; none if the run's data cannot be read (an export does not need it)."""
    formatter = build_formatter(config.data.format, tokenizer.template_tokens)
    try:
        for segments in islice(documents(config.data, "validation", formatter), _DOCUMENTS):
            yield "".join(segment.text for segment in segments)[:_CHARACTERS]
    except UserError:
        return


def _difference(text: str, found: Sequence[int], wanted: Sequence[int]) -> str:
    """The message for a text that becomes `found` in transformers, and `wanted` here."""
    pairs = enumerate(zip(found, wanted, strict=False))
    at = next((place for place, pair in pairs if pair[0] != pair[1]), min(len(found), len(wanted)))
    return (
        f"transformers reads this run's tokenizer differently than training did: from {text[:60]!r}, token {at} is "
        f"{_named(found, at)} there and {_named(wanted, at)} here, so the exported model would see other tokens than "
        "it was trained on; train with another data.tokenizer, or use export.format=onnx, and tokenizer.json with the "
        "library tokenizers"
    )


def _named(ids: Sequence[int], at: int) -> str:
    return str(ids[at]) if at < len(ids) else "missing"
