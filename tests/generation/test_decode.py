"""Decoding: the cache changes nothing, texts end where they must, and batches make no difference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoding import EOS, PROMPTS, decoder, decoding, ids
from tiny import tiny_model

from pretune.compute.compilation import compile_frozen
from pretune.core.config import ConfigError, InputError
from pretune.generation.decode import Compiled
from pretune.model.transformer import Transformer


@torch.no_grad()
def greedy_without_cache(model: Transformer, prompt: list[int], steps: int, ends: tuple[int, ...]) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + steps, model.config.max_sequence_length):
        token = int(model.unembed(model(torch.tensor([tokens])))[0, -1, :61].argmax())
        if token in ends:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": 2, "qk_norm": True, "tied_embeddings": False, "softcap": 9.0},
        {
            "num_layers": 3,
            "window": {"size": 3, "pattern": "SL", "full_last_layer": True},
            "value_embeddings": True,
            "residual_scalars": True,
        },
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_batch_with_cache_equals_one_by_one_without(changes, seed) -> None:
    model = tiny_model(seed=seed, **changes)
    alone = [greedy_without_cache(model, prompt, 40, (EOS,)) for prompt in PROMPTS]
    assert ids(decoder(model), max_new_tokens=40) == alone
    # End tokens that are really generated, so that rows end at different steps.
    ends = (alone[0][2], alone[2][4])
    alone = [greedy_without_cache(model, prompt, 40, ends) for prompt in PROMPTS]
    assert len({len(text) for text in alone}) > 1
    assert ids(decoder(model, *ends), max_new_tokens=40) == alone
    assert ids(decoder(model, *ends), rows=3, max_new_tokens=40) == alone


def test_a_compiled_step_writes_the_same() -> None:
    # As compiled, but without the compiler: the batch keeps its shape, filled up with unused rows.
    compiled: list[torch.Size] = []

    def compile_nothing(step):
        def run(tokens, cache):
            compiled.append(tokens.shape)
            return step(tokens, cache)

        return run

    model = tiny_model()
    plain = ids(decoder(model), max_new_tokens=20)
    end = plain[0][2]
    static = decoder(model, end, compiled=Compiled(3, compile_nothing))
    assert ids(static, rows=3, max_new_tokens=20) == ids(decoder(model, end), max_new_tokens=20)
    assert set(compiled) == {(3, 1)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_compiler_changes_nothing() -> None:
    for seed in (1, 2):  # the second model must not use the weights of the first
        model = tiny_model(seed, num_kv_heads=2, qk_norm=True)
        compiled = decoder(model, compiled=Compiled(4, compile_frozen))
        assert ids(compiled, rows=4, max_new_tokens=20) == ids(decoder(model), max_new_tokens=20)


def test_texts_end_at_the_last_position() -> None:
    model = tiny_model(max_sequence_length=12)
    assert [len(text) for text in ids(decoder(model, -1), max_new_tokens=50)] == [9, 11, 3, 10]
    assert [len(text) for text in ids(decoder(model, -1), max_new_tokens=5)] == [5, 5, 3, 5]


def test_a_prompt_without_room_is_an_error() -> None:
    with pytest.raises(InputError, match=r"prompt 3 has 9 tokens.*room for 9"):
        ids(decoder(tiny_model(max_sequence_length=9)), rows=1)


def test_no_prompts() -> None:
    assert ids(decoder(tiny_model()), []) == []


@pytest.mark.parametrize("changes", [{}, {"temperature": 100.0}, {"num_beams": 3}, {"repetition_penalty": 3.0}])
def test_ids_that_the_tokenizer_lacks_are_never_written(changes) -> None:
    model = tiny_model(vocab_multiple_of=64)
    new = ids(decoder(model, -1, vocab_size=5), max_new_tokens=20, **changes)
    assert {token for text in new for token in text} <= set(range(5))


def test_same_seed_same_text_whoever_else_is_in_the_batch() -> None:
    warm: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 15, "top_p": 0.9, "frequency_penalty": 0.3}
    one = decoder(tiny_model())
    new = ids(one, **warm)
    assert ids(one, **warm) == new
    assert ids(one, **warm, seed=1) != new
    assert ids(one, [[20, 21], *PROMPTS[1:]], **warm)[1:] == new[1:]
    # Neither the batch size nor the prompts after it make a difference.
    for rows in (1, 2, 3):
        assert ids(one, rows=rows, **warm) == new
    assert ids(one, PROMPTS[:2], **warm) == new[:2]


def test_penalties_see_the_prompt_or_the_text() -> None:
    model = tiny_model(seed=3)
    assert len(set(ids(decoder(model, -1), [[5]], max_new_tokens=12)[0])) < 12
    never_twice = ids(decoder(model, -1), [[5]], max_new_tokens=12, frequency_penalty=1000.0)[0]
    assert len(set(never_twice)) == 12
    # The prompt has all ids but one: the repetition penalty favours that one; the frequency penalty ignores the prompt.
    prompt = [token for token in range(27) if token != 9]
    (free,) = ids(decoder(model, -1, vocab_size=27), [prompt], max_new_tokens=1)
    (repelled,) = ids(decoder(model, -1, vocab_size=27), [prompt], max_new_tokens=1, repetition_penalty=1000.0)
    assert repelled == [9]
    assert ids(decoder(model, -1, vocab_size=27), [prompt], max_new_tokens=1, frequency_penalty=1000.0) == [free]


def test_the_global_generator_and_the_mode_of_the_model_are_left_alone() -> None:
    model = tiny_model(dropout=0.5).train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    new = ids(decoder(model), temperature=1.0)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert ids(decoder(model.eval()), temperature=1.0) == new
    assert not model.training


def test_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        new = ids(decoder(tiny_model(), -1))
    assert [len(text) for text in new] == [8] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_beams": 2, "temperature": 0.5}, "set temperature to 0"),
        ({"num_beams": 2, "stop": ["x"]}, "set stop to"),
        ({"top_p": 0.0}, "top_p"),
        ({"stop": [""]}, "stop.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ],
)
def test_settings_that_make_no_sense(changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        decoding(**changes)
