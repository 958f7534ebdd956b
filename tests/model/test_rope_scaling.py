"""Rotary positions that are stretched: frequencies, attention factors and texts against transformers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tiny import SCALINGS, stretched, tiny_config, tiny_model
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pretune.core.config import ConfigError, validate
from pretune.generation.decode import Compiled, Decoder, Vocabulary
from pretune.model.rope import Rope, attention_factor, frequencies
from pretune.model.rope_config import RopeConfig
from pretune.model.transformer import Transformer

ORIGINAL = {"original_max_position_embeddings": 64}
YARN: dict[str, Any] = {
    "kind": "yarn",
    "factor": 4.0,
    **ORIGINAL,
    "attention_factor": None,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": None,
    "mscale_all_dim": None,
    "truncate": True,
}
LONGROPE: dict[str, Any] = {
    "kind": "longrope",
    "short_factor": [1.0 + 0.1 * one for one in range(16)],
    "long_factor": [1.5 + one for one in range(16)],
    **ORIGINAL,
    "attention_factor": 1.19,
}
RULES: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear", "factor": 3.0},
    "dynamic": {"kind": "dynamic", "factor": 2.0, **ORIGINAL},
    "yarn": YARN,
    "yarn, sharpened": YARN | {"attention_factor": 1.4, "beta_fast": 6.0, "beta_slow": 0.5},
    "yarn, between indices": YARN | {"truncate": False, "beta_fast": 4.0},
    "yarn, of DeepSeek": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "factor": 40.0},
    "yarn, from a few positions": YARN | {"original_max_position_embeddings": 3},
    "longrope": LONGROPE,
    "llama3": {"kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
}


def rope(scaling: dict[str, Any] | None, theta: float = 1e4, fraction: float = 1.0) -> RopeConfig:
    return validate(
        RopeConfig, {"theta": theta, "local_theta": None, "fraction": fraction, "scaling": scaling, "pattern": "R"}
    )


def theirs(scaling: dict[str, Any], length: int, theta: float) -> tuple[torch.Tensor, float]:
    """transformers' frequencies of heads 32 wide, and its attention factor."""
    parameters = {"rope_theta": theta, "rope_type": scaling["kind"], **scaling}
    parameters = {key: value for key, value in parameters.items() if key != "kind" and value is not None}
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, head_dim=32, max_position_embeddings=64, rope_parameters=parameters
    )
    return ROPE_INIT_FUNCTIONS[scaling["kind"]](config, torch.device("cpu"), seq_len=length)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [1, 64, 65, 300])
@pytest.mark.parametrize("theta", [100.0, 1e4, 1e6])
def test_tables_are_those_of_transformers(rule: str, length: int, theta: float) -> None:
    config = rope(RULES[rule], theta)
    wanted, factor = theirs(RULES[rule], length, theta)
    found = frequencies(config, 32, torch.tensor([length]))[0]
    torch.testing.assert_close(found, wanted.double(), rtol=0, atol=1e-6)
    assert attention_factor(config.scaling) == pytest.approx(factor, abs=1e-6)
    # What the model adds to its queries and keys: exact cosines and sines of these frequencies, times the factor.
    table = Rope(config, 32, 300).first(length)
    angles = torch.arange(length).double()[:, None] * found
    exact = attention_factor(config.scaling) * torch.stack((angles.cos(), angles.sin()))
    torch.testing.assert_close(table.double(), exact, rtol=0, atol=1e-6)


def test_ntk_divides_the_slowest_frequency_by_the_factor_and_keeps_the_fastest() -> None:
    plain = frequencies(rope(None), 32, torch.tensor([1]))[0]
    raised = frequencies(rope({"kind": "ntk", "factor": 5.0}), 32, torch.tensor([1]))[0]
    assert raised[0] == plain[0]
    assert raised[-1].item() == pytest.approx(plain[-1].item() / 5, rel=1e-12)
    # dynamic has the theta of ntk for the growth that it has reached: 1 + 2 (3 - 1) at three times the length.
    dynamic = frequencies(rope(RULES["dynamic"]), 32, torch.tensor([192]))[0]
    torch.testing.assert_close(dynamic, raised, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rule", SCALINGS)
def test_documents_in_one_row_are_as_if_alone_whatever_their_lengths(rule: str) -> None:
    model, tokens = tiny_model(rope=stretched(rule)), torch.arange(32)[None]
    together = model(tokens, torch.tensor([[0] * 5 + [1] * 20 + [2] * 7], dtype=torch.int32))
    for ours, document in zip(together.split([5, 20, 7], 1), tokens.split([5, 20, 7], 1), strict=True):
        torch.testing.assert_close(ours, model(document), rtol=1e-4, atol=1e-5)


def logits_of(model: Transformer, prompts: list[list[int]], num_new: int, compiled: Compiled | None) -> torch.Tensor:
    """Logits [B, num_new + 1, V] after each prompt and after each of the tokens 1, 2... that follow it."""
    decoder = Decoder(model, Vocabulary(61, frozenset()), torch.device("cpu"), compiled)
    first, cache = decoder.read(prompts, num_new)
    rest = [decoder.next(torch.full((len(prompts),), token), cache) for token in range(1, num_new + 1)]
    return torch.stack([first, *rest], 1)


@pytest.mark.parametrize("compiled", [None, Compiled(3, partial(torch.compile, backend="eager", fullgraph=True))])
@pytest.mark.parametrize("rule", SCALINGS)
def test_generating_beyond_the_original_length(rule: str, compiled: Compiled | None) -> None:
    """Each step is what reading the whole text gives, at the length where longrope changes its factors too, and for
    texts of different lengths in one batch. Under dynamic, keys in the cache keep their rotation, as in transformers
    (tests/model/huggingface/test_folder.py), up to the original length there is no difference."""
    model = tiny_model(rope=stretched(rule)).eval()
    prompts, num_new = [list(range(30, 30 + n)) for n in (14, 9, 3)], 10
    found = logits_of(model, prompts, num_new, compiled)
    for logits, prompt in zip(found, prompts, strict=True):
        for step in range(num_new + 1):
            text = [*prompt, *range(1, step + 1)]
            if rule == "dynamic" and len(text) > 16:
                break
            wanted = model.unembed(model(torch.tensor([text])))[0, -1]
            torch.testing.assert_close(logits[step], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", ["dynamic", "longrope"])
def test_compiled_code_serves_every_length(rule: str) -> None:
    model, tokens = tiny_model(rope=stretched(rule)), torch.arange(32)[None]
    torch.compiler.reset()  # what another test compiled counts too
    graph = torch.compile(model, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for cut in (3, 10, 16, 17, 30):
            ids = (tokens >= cut).int()
            torch.testing.assert_close(graph(tokens, ids), model(tokens, ids))


def test_a_text_does_not_depend_on_the_lengths_before_it() -> None:
    model, tokens = tiny_model(rope=stretched("dynamic")), torch.arange(32)[None]
    before = model(tokens[:, :20])
    model(tokens)
    assert torch.equal(model(tokens[:, :20]), before)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (YARN | {"beta_slow": 40.0}, "beta_fast (32) must exceed beta_slow (40)"),
        (YARN | {"mscale": 1.0}, "mscale and mscale_all_dim count only together"),
        (YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.2}, "attention_factor replaces"),
        (YARN | {"factor": 0.5}, "factor"),
        (LONGROPE, "rope.scaling.short_factor has 16 numbers, but heads with 8 rotated components have 4"),
        ({"kind": "ntk", "factor": 2.0}, "needs at least 4 rotated components, but heads have 2"),
        ({"kind": "spiral"}, "kind"),
    ],
)
def test_contradictions_are_named_in_one_line(scaling: dict[str, Any], message: str) -> None:
    fraction = 0.25 if scaling["kind"] == "ntk" else 1.0
    with pytest.raises(ConfigError) as caught:
        tiny_config(rope={"theta": 1e4, "fraction": fraction, "scaling": scaling, "pattern": "R"})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
