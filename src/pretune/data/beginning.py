"""What a tokenizer puts before a text when transformers calls it: a BOS, for the models that were pretrained with one.

The post-processor of tokenizer.json decides it, there and here; `add_bos_token` in tokenizer_config.json says the same
to llama.cpp's converter, and nothing to transformers, where there is a tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pretune.core.config import InputError
from pretune.data.pipeline import steps

if TYPE_CHECKING:
    import tokenizers


def keep_beginning(backend: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The ids that the tokenizer puts before a text. What it puts after one is taken from it: documents end in EOS.

    Raises InputError for an id that no token has.
    """
    from tokenizers import processors

    if not backend.num_special_tokens_to_add(is_pair=False):
        return ()
    parts = {"post_processor": json.loads(backend.post_processor.__getstate__())}
    before: list[tuple[str, int]] = []
    after = False
    for step in steps(parts, "post_processor"):
        first, last = _added(step)
        before, after = [*first, *before], after or last
    if unknown := [index for _, index in before if backend.id_to_token(index) is None]:
        raise InputError(
            f"the tokenizer's post-processor puts {unknown[0]} before a text, which no token has as its id"
        )
    if after or not before:
        names = [name for name, _ in before]
        backend.post_processor = (
            processors.TemplateProcessing([*names, "$A"], special_tokens=before) if before else None
        )
    return tuple(index for _, index in before)


def _added(step: dict[str, Any]) -> tuple[list[tuple[str, int]], bool]:
    """The tokens with their ids that a step of a post-processor puts before a text, and whether it puts some after."""
    if step["type"] in ("BertProcessing", "RobertaProcessing"):
        return [tuple(step["cls"])], True
    if step["type"] != "TemplateProcessing":
        return [], False
    places = ["Sequence" in piece for piece in step["single"]]
    at = places.index(True)
    names = [piece["SpecialToken"]["id"] for piece in step["single"][:at]]
    tokens = [step["special_tokens"][name] for name in names]
    before = [pair for token in tokens for pair in zip(token["tokens"], token["ids"], strict=True)]
    return before, at + 1 < len(places)


def missing_beginning(beginning: tuple[int, ...], ids: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """What a document with these ids of its segments lacks at its beginning: `beginning`, or nothing if its text has it
    already, because a chat template wrote it."""
    first: list[int] = []
    for segment in ids:
        first += segment[: len(beginning) - len(first)]
        if len(first) == len(beginning):
            break
    return () if tuple(first) == beginning else beginning
