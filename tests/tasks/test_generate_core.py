"""Continuing prompts: the cache changes nothing, texts end where they must, and sampling samples what it should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from pretune.config import InputError
from pretune.model.transformer import Transformer
from pretune.run_config import SamplingConfig
from pretune.tasks.generate import choose, continuations

CPU, EOS = torch.device("cpu"), 60
PROMPTS = [[1, 2, 3], [7], [4, 5, 6, 7, 8, 9, 10, 11, 12], [30, 31]]


def sampling(**changes: Any) -> SamplingConfig:
    values = {"temperature": 0.0, "top_k": None, "top_p": None, "max_new_tokens": 8, "seed": 0}
    return SamplingConfig(**(values | changes))


@torch.no_grad()
def greedy_without_cache(model: Transformer, prompt: list[int], steps: int, eos_id: int, vocab: int = 61) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + steps, model.config.max_sequence_length):
        token = int(model.unembed(model(torch.tensor([tokens])))[0, -1, :vocab].argmax())
        if token == eos_id:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    "changes", [{}, {"num_kv_heads": 2, "qk_norm": True, "tied_embeddings": False, "softcap": 9.0}]
)
@pytest.mark.parametrize("seed", range(4))
def test_batch_with_cache_equals_one_by_one_without(changes, seed) -> None:
    model = tiny_model(seed=seed, **changes)
    alone = [greedy_without_cache(model, prompt, 40, EOS) for prompt in PROMPTS]
    assert continuations(model, 61, EOS, PROMPTS, sampling(max_new_tokens=40), CPU) == alone
    # Some id that is really produced, as EOS: rows then end at different steps.
    eos = alone[0][2]
    alone = [greedy_without_cache(model, prompt, 40, eos) for prompt in PROMPTS]
    assert len({len(text) for text in alone}) > 1
    assert continuations(model, 61, eos, PROMPTS, sampling(max_new_tokens=40), CPU) == alone


def test_texts_end_at_the_last_position() -> None:
    model = tiny_model(max_sequence_length=12)
    new = continuations(model, 61, -1, PROMPTS, sampling(max_new_tokens=50), CPU)
    assert [len(text) for text in new] == [9, 11, 3, 10]
    assert [len(text) for text in continuations(model, 61, -1, PROMPTS, sampling(max_new_tokens=5), CPU)] == [
        5,
        5,
        3,
        5,
    ]


def test_a_prompt_without_room_is_an_error() -> None:
    model = tiny_model(max_sequence_length=9)
    with pytest.raises(InputError, match=r"prompt 3 has 9 tokens.*room for 9"):
        continuations(model, 61, EOS, PROMPTS, sampling(), CPU)


def test_no_prompts_and_empty_prompts() -> None:
    model = tiny_model()
    assert continuations(model, 61, EOS, [], sampling(), CPU) == []
    assert continuations(model, 61, EOS, [[]], sampling(), CPU) == continuations(
        model, 61, EOS, [[EOS]], sampling(), CPU
    )


def test_ids_that_the_tokenizer_lacks_are_never_sampled() -> None:
    model = tiny_model(vocab_multiple_of=64)
    for temperature in (0.0, 100.0):
        new = continuations(model, 5, -1, PROMPTS, sampling(temperature=temperature, max_new_tokens=20), CPU)
        assert {token for text in new for token in text} <= set(range(5))


def test_same_seed_same_text_whoever_else_is_in_the_batch() -> None:
    model, warm = tiny_model(), sampling(temperature=1.0, max_new_tokens=15)
    texts = continuations(model, 61, EOS, PROMPTS, warm, CPU)
    assert continuations(model, 61, EOS, PROMPTS, warm, CPU) == texts
    assert continuations(model, 61, EOS, PROMPTS, sampling(temperature=1.0, max_new_tokens=15, seed=1), CPU) != texts
    others = [[20, 21], *PROMPTS[1:]]
    assert continuations(model, 61, EOS, others, warm, CPU)[1:] == texts[1:]


def test_the_global_generator_and_the_mode_of_the_model_are_left_alone() -> None:
    model = tiny_model(dropout=0.5).train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    texts = continuations(model, 61, EOS, PROMPTS, sampling(temperature=1.0), CPU)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert continuations(model.eval(), 61, EOS, PROMPTS, sampling(temperature=1.0), CPU) == texts
    assert not model.training


def test_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        new = continuations(tiny_model(), 61, -1, PROMPTS, sampling(), CPU)
    assert [len(text) for text in new] == [8] * 4


@settings(deadline=None, max_examples=80)
@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12, unique=True),
    temperature=st.sampled_from([1e-30, 0.3, 1.0, 5.0]),
    top_k=st.one_of(st.none(), st.integers(1, 15)),
    top_p=st.one_of(st.none(), st.floats(0.01, 1.0)),
    luck=st.sampled_from([0.0, 0.3, 1 - 2**-53]),
)
def test_choice_is_among_the_likeliest(logits, temperature, top_k, top_p, luck) -> None:
    row = torch.tensor([logits])
    config = sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    token = int(choose(row, config, torch.tensor([luck], dtype=torch.float64)))
    probabilities = ((row - row.max()).double() / temperature).softmax(-1)[0]
    likelier = (probabilities > probabilities[token]).sum()
    assert likelier < (top_k or len(logits))
    if top_p is not None:
        kept = probabilities.topk(min(top_k or len(logits), len(logits))).values
        above = kept[kept > probabilities[token]].sum() / kept.sum()
        assert above < top_p + 1e-6
    if temperature == 1e-30:
        assert logits[token] == max(logits)


def test_tokens_come_as_often_as_they_are_probable() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0, 1.5]])
    luck = torch.arange(0.0005, 1, 0.001, dtype=torch.float64)  # evenly over the scale
    for changes, kept in (({}, [0, 1, 2, 3, 4]), ({"top_k": 3}, [0, 2, 4]), ({"top_p": 0.7}, [0, 4])):
        chosen = choose(logits.expand(1000, -1), sampling(temperature=0.7, **changes), luck)
        share = torch.bincount(chosen, minlength=5) / 1000
        wanted = torch.zeros(5)
        wanted[kept] = (logits[0, kept] / 0.7).softmax(-1)
        torch.testing.assert_close(share, wanted, rtol=0, atol=0.002)
