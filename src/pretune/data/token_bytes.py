"""How many bytes of text a token stands for."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from pretune.data.pipeline import steps

if TYPE_CHECKING:
    import tokenizers


def token_bytes(backend: tokenizers.Tokenizer, size: int) -> np.ndarray:
    """The number of bytes of text of each id: [size] int32, 0 for special tokens.

    What a token stands for is decided by the tokenizer's model and decoder, as when decoding. Byte-level: a character
    is a byte. SentencePiece: its character for a space is a space, and with byte fallback <0x41> is a byte. WordPiece
    and BPE with word boundaries: the marks of the boundaries are no text, and neither are spaces between words, which
    such tokenizers drop.
    """
    parts = json.loads(backend.to_str())
    byte_level = any(step["type"] == "ByteLevel" for step in steps(parts, "pre_tokenizer", "decoder"))
    of_text = _visible_length(parts)
    lengths = np.zeros(size, dtype=np.int32)
    added = backend.get_added_tokens_decoder()
    for token, index in backend.get_vocab(with_added_tokens=True).items():
        if index in added and added[index].special:
            continue
        if byte_level:
            lengths[index] = len(token.encode()) if index in added else len(token)
        else:
            lengths[index] = of_text(token)
    return lengths


def _visible_length(parts: dict[str, Any]) -> Callable[[str], int]:
    """The function from a token of a tokenizer that is not byte-level to the number of bytes of its text."""
    model = parts["model"]
    decoders = list(steps(parts, "decoder"))
    replaced = [(step["pattern"]["String"], step["content"]) for step in decoders if _replaces_a_string(step)]
    spaces = [step for step in steps(parts, "pre_tokenizer", "decoder") if step["type"] == "Metaspace"]
    replaced += [(step["replacement"], " ") for step in spaces]
    fallback = model.get("byte_fallback") or any(step["type"] == "ByteFallback" for step in decoders)
    before, after = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""

    def length(token: str) -> int:
        if fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return 1
        token = token.removeprefix(before).removesuffix(after)
        for mark, text in replaced:
            token = token.replace(mark, text)
        return len(token.encode())

    return length


def _replaces_a_string(step: dict[str, Any]) -> bool:
    return step["type"] == "Replace" and "String" in step["pattern"]
