"""Decoding that is compiled for a GPU writes what it writes uncompiled, and what the CPU writes."""

from __future__ import annotations

from typing import Any

import pytest
from card import CARD, ON_THE_CARD
from decoding import decoder, ids
from tiny import tiny_model

from pretune.compute.compilation import compile_frozen
from pretune.generation.decode import Compiled

pytestmark = ON_THE_CARD
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "grouped heads, windows": {
        "num_kv_heads": 2,
        "qk_norm": True,
        "window": {"size": 5, "pattern": "SL", "full_last_layer": True},
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_are_the_same(shape: str) -> None:
    model = tiny_model(1, **SHAPES[shape])
    wanted = ids(decoder(model), max_new_tokens=20)
    model.to(CARD)
    assert ids(decoder(model, device=CARD), max_new_tokens=20) == wanted
    compiled = decoder(model, device=CARD, compiled=Compiled(4, compile_frozen))
    assert ids(compiled, rows=4, max_new_tokens=20) == wanted
