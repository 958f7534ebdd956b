"""Models lowered to ExecuTorch generate the same text as in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILY_SWITCHES, stretched, tiny_model
from torch import Tensor

from pretune.core.config import ConfigError, InputError
from pretune.generation.decode import Decoder, LanguageModel, Vocabulary

pytest.importorskip("executorch", reason="executorch is not installed (req-phone.txt)")

from pretune.quantization.config import Int4WeightOnlyConfig, Int8Int4Config
from pretune.quantization.convert import convert
from pretune.runtimes.executorch.lowering import STAGES, Interface, lower
from pretune.runtimes.executorch.program import Program

CONTEXT, VOCABULARY, ENDS = 128, 90, (3, 5)
SHAPE: dict[str, Any] = {
    "num_layers": 1, "dim": 64, "head_dim": 16, "mlp_dim": 96, "vocab_size": 96, "num_kv_heads": 2,
    "max_sequence_length": CONTEXT,
}  # fmt: skip
SWITCHES: dict[str, Any] = {
    "num_layers": 2, "qk_norm": True, "softcap": 15.0, "value_embeddings": True,
    "window": {"size": 8, "pattern": "SL", "full_last_layer": True},
    "residual_scalars": True, "normalize_embedding": True, "tied_embeddings": False, "activation": "relu_squared",
    "attention_scale": 1.2, "rope": {"theta": 1e4, "fraction": 0.5, "scaling": None, "pattern": "R"},
}  # fmt: skip
ROUNDED = Int8Int4Config(kind="int8_int4", group_size=32, embedding="int4", head="int4")
PROMPT = [5, 7, 9, 11, 13]


def lowered(model: Any, path: Path, vocab_size: int = VOCABULARY) -> Program:
    assert len(list(lower(model, Interface(CONTEXT, vocab_size, ENDS), path))) == STAGES
    return Program(path)


def greedy(model: LanguageModel, prompt: list[int], tokens: list[int] | None = None) -> tuple[list[int], Tensor]:
    """64 tokens after a prompt, greedy or given, and the logits [64, V] they come from."""
    decoder = Decoder(model, Vocabulary(VOCABULARY, frozenset()), torch.device("cpu"))
    logits, cache = decoder.read([prompt], 64)
    written, found = [], []
    for place in range(64):
        found.append(logits[0])
        written.append(int(logits.argmax()))
        following = written[-1] if tokens is None else tokens[place]
        logits = decoder.next(torch.tensor([following]), cache)
    return written, torch.stack(found)


@pytest.mark.slow
def test_all_switches_together(tmp_path: Path) -> None:
    model = tiny_model(**(SHAPE | SWITCHES)).eval()
    program = lowered(model, tmp_path / "model.pte")
    for prompt in ([5], PROMPT, list(range(2, 50))):  # one after the other: each starts from an empty cache
        tokens, logits = greedy(model, prompt)
        found = greedy(program, prompt)
        assert found[0] == tokens
        torch.testing.assert_close(found[1], logits, rtol=1e-4, atol=1e-4)
    constants = {"get_max_seq_len": 127, "get_max_context_len": 128, "get_vocab_size": 90, "get_eos_ids": [3, 5]}
    assert {name: program.constant(name) for name in constants} == constants
    assert program.config.max_sequence_length == CONTEXT


@pytest.mark.slow
def test_integers(tmp_path: Path) -> None:
    model = tiny_model(**SHAPE).eval()
    whole = greedy(model, PROMPT)
    convert(model, ROUNDED)
    tokens, logits = greedy(model, PROMPT)
    assert not torch.allclose(logits, whole[1], atol=0.05)
    program = lowered(model, tmp_path / "model.pte")
    # The tolerance: an activation between two integers may be rounded to the other one.
    found = greedy(program, PROMPT, tokens)
    assert (found[1] - logits).square().mean().sqrt() < 0.02 * logits.std()
    assert found[0] == tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "geglu", "norm": {"kind": "layernorm", "eps": 1e-5, "learned": True}},
        {"activation": "gelu", "norm": {"kind": "layernorm", "eps": 1e-5, "learned": False}, "num_kv_heads": 4},
        {
            "bias": {"qkv": True, "attention_output": True, "mlp": True},
            "rope": {"theta": 1e4, "fraction": 0.0, "scaling": None, "pattern": "R"},
        },
        {"activation": "reglu", "num_kv_heads": 1},
        {"learned_positions": True, "rope": {"theta": 1e4, "fraction": 0.0, "scaling": None, "pattern": "R"}},
        {"activation": "silu", "norm": {"kind": "rmsnorm", "eps": 1e-5, "learned": False}},
        FAMILY_SWITCHES["olmo2"],
        FAMILY_SWITCHES["gemma3_text"],
    ],
)
def test_each_kind_of_layer(changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(**(SHAPE | changes)).eval()
    tokens, logits = greedy(model, PROMPT)
    found = greedy(lowered(model, tmp_path / "model.pte"), PROMPT)
    assert found[0] == tokens
    torch.testing.assert_close(found[1], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("embedding", "head"), [("int8", "int8"), ("none", "none")])
def test_tables_and_heads(embedding: Any, head: Any, tmp_path: Path) -> None:
    model = tiny_model(**(SHAPE | {"tied_embeddings": False, "value_embeddings": True})).eval()
    convert(model, ROUNDED.model_copy(update={"embedding": embedding, "head": head}))
    tokens, logits = greedy(model, PROMPT)
    found = greedy(lowered(model, tmp_path / "model.pte"), PROMPT, tokens)
    assert (found[1] - logits).square().mean().sqrt() < 0.02 * logits.std()


def test_what_xnnpack_lacks_is_named(tmp_path: Path) -> None:
    model = tiny_model(**SHAPE).eval()
    convert(model, Int4WeightOnlyConfig(kind="int4_weight_only", group_size=32, embedding="int4", head="int4"))
    with pytest.raises(ConfigError, match=r"no kernel for layers\.0\.attention\.qkv.*use quantization=int8_int4"):
        lowered(model, tmp_path / "model.pte")
    model = tiny_model(**SHAPE).eval()
    convert(model, ROUNDED.model_copy(update={"group_size": 16}))
    with pytest.raises(ConfigError, match=r"layers\.0\.attention\.qkv has groups of 16"):
        lowered(model, tmp_path / "model.pte")


@pytest.mark.parametrize("rule", ["dynamic", "longrope"])
def test_positions_that_follow_the_length_are_named(rule: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"model\.rope\.scaling\.kind = {rule} needs"):
        lowered(tiny_model(rope=stretched(rule)).eval(), tmp_path / "model.pte")


@pytest.mark.parametrize("content", [b"", b"not a program"])
def test_a_file_that_is_no_program(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.pte").write_bytes(content)
    with pytest.raises(InputError, match=r"is not a \.pte that ExecuTorch can load"):
        Program(tmp_path / "model.pte")


def test_attention_softcaps_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.attention_softcap = 2, as in Gemma 2\)"):
        lowered(tiny_model(**FAMILY_SWITCHES["gemma2"]).eval(), tmp_path / "model.pte")
