"""Shared by the tests of generation: a decoding configuration, a decoder, and letters as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from pretune.core.config import validate
from pretune.generation.config import DecodingConfig
from pretune.generation.decode import Compiled, Decoder, Vocabulary
from pretune.generation.texts import Decodes, Text, in_batches
from pretune.model.transformer import Transformer

CPU, EOS = torch.device("cpu"), 60
PROMPTS = [[1, 2, 3], [7], [4, 5, 6, 7, 8, 9, 10, 11, 12], [30, 31]]


def decoding(**changes: Any) -> DecodingConfig:
    """Greedy, eight tokens, unless changed."""
    values = {
        "max_new_tokens": 8,
        "temperature": 0.0,
        "top_k": None,
        "top_p": None,
        "min_p": None,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "num_beams": 1,
        "length_penalty": 1.0,
        "stop": [],
        "end_tokens": [],
        "seed": 0,
    }
    return validate(DecodingConfig, values | changes)


def decoder(
    model: Transformer,
    *end_ids: int,
    vocab_size: int = 61,
    compiled: Compiled | None = None,
    device: torch.device = CPU,
) -> Decoder:
    return Decoder(model, Vocabulary(vocab_size, frozenset(end_ids or (EOS,))), device, compiled)


class Numbers:
    """A tokenizer whose text consists of the ids."""

    special_tokens: Mapping[int, str] = MappingProxyType({})

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"<{token}>" for token in ids)


def numbers(text: str) -> list[int]:
    """The ids in a text made by `Numbers`."""
    return [int(part) for part in text.replace("<", " ").replace(">", " ").split()]


def texts(
    decoder: Decoder, tokenizer: Decodes, prompts: Sequence[Sequence[int]], config: DecodingConfig, rows: int = 99
) -> list[Text]:
    """The text after each prompt, in the order of the prompts."""
    return [text for _, text in sorted(in_batches(decoder, tokenizer, prompts, config, rows), key=lambda one: one[0])]


def ids(
    decoder: Decoder, prompts: Sequence[Sequence[int]] = PROMPTS, rows: int = 99, **changes: Any
) -> list[list[int]]:
    """The tokens after each prompt."""
    return [numbers(text.text) for text in texts(decoder, Numbers(), prompts, decoding(**changes), rows)]
