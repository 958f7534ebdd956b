"""Filters and penalties against transformers' own processors, and sampling against exact probabilities."""

from __future__ import annotations

import pytest
import torch
from decoding import CPU, decoding
from hypothesis import given, settings
from hypothesis import strategies as st

from pretune.core.config import ConfigError
from pretune.generation.sampling import History, choose, filtered, penalized

V = 700  # more than the first attempt at the nucleus reads


def random_logits(rows: int = 5, scale: float = 4.0) -> torch.Tensor:
    return scale * torch.randn(rows, V, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0, 30.0])
@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": 5000},
        {"top_p": 0.01},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"min_p": 0.0},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"temperature": 1.7, "top_k": 300, "top_p": 0.8, "min_p": 0.02},
    ],
)
def test_filters_are_those_of_transformers(changes, scale) -> None:
    from transformers.generation import logits_process as theirs

    logits, config = random_logits(scale=scale), decoding(**{"temperature": 1.0} | changes)
    wanted = logits
    processors = [theirs.TemperatureLogitsWarper(config.temperature)]
    if config.top_k is not None:
        processors.append(theirs.TopKLogitsWarper(config.top_k))
    if config.top_p is not None:
        processors.append(theirs.TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        processors.append(theirs.MinPLogitsWarper(config.min_p))
    for processor in processors:
        wanted = processor(torch.zeros(5, 1, dtype=torch.int64), wanted)
    found = filtered(logits, config)
    assert torch.equal(found.isinf(), wanted.isinf())
    torch.testing.assert_close(found.softmax(-1), wanted.softmax(-1))


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_the_repetition_penalty_is_that_of_transformers(penalty) -> None:
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    prompts, new = [[3, 4, 4], [699]], [[5, 3], [0, 0]]
    history = History(prompts, V, CPU)
    for tokens in zip(*new, strict=True):
        history.add(torch.tensor(tokens))
    logits = random_logits(2)
    found = penalized(logits, decoding(repetition_penalty=penalty), history)
    for row in range(2):
        ids = torch.tensor([prompts[row] + new[row]])
        wanted = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits[row : row + 1].clone())
        torch.testing.assert_close(found[row : row + 1], wanted)


def test_the_frequency_penalty_counts_what_was_written() -> None:
    history = History([[7, 7], [8]], 10, CPU)
    for tokens in ([1, 2], [1, 3], [1, 2]):
        history.add(torch.tensor(tokens))
    history.keep(torch.tensor([1, 0, 0]))
    taken = -penalized(torch.zeros(3, 10), decoding(frequency_penalty=0.5), history)
    expected = torch.zeros(3, 10)
    expected[0, 2], expected[0, 3], expected[1:, 1] = 1.0, 0.5, 1.5
    assert torch.equal(taken, expected)


@settings(max_examples=80)
@given(
    # Exact in float32, and far enough apart to stay distinct at the lowest temperature.
    logits=st.lists(st.integers(-20_000, 20_000).map(lambda n: n / 1024), min_size=1, max_size=12, unique=True),
    temperature=st.sampled_from([1e-320, 1e-30, 0.3, 1.0, 5.0]),
    top_k=st.one_of(st.none(), st.integers(1, 15)),
    top_p=st.one_of(st.none(), st.floats(0.01, 1.0)),
    luck=st.sampled_from([0.0, 0.3, 1 - 2**-53]),
)
def test_the_choice_is_among_the_likeliest(logits, temperature, top_k, top_p, luck) -> None:
    row = torch.tensor([logits])
    config = decoding(temperature=temperature, top_k=top_k, top_p=top_p)
    token = int(choose(row, config, torch.tensor([luck], dtype=torch.float64)))
    probabilities = ((row - row.max()).double() / temperature).softmax(-1)[0]
    likelier = (probabilities > probabilities[token]).sum()
    assert likelier < (top_k or len(logits))
    if top_p is not None:
        kept = probabilities.topk(min(top_k or len(logits), len(logits))).values
        above = kept[kept > probabilities[token]].sum() / kept.sum()
        assert above < top_p + 1e-6
    if temperature <= 1e-30:
        assert logits[token] == max(logits)


@pytest.mark.parametrize("key", ["repetition_penalty", "frequency_penalty", "length_penalty"])
def test_a_penalty_that_would_overflow_is_refused(key) -> None:
    with pytest.raises(ConfigError, match=f"'{key}' = 1e\\+308"):
        decoding(**{key: 1e308})


def test_tokens_come_as_often_as_they_are_probable() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0, 1.5]])
    luck = torch.arange(0.0005, 1, 0.001, dtype=torch.float64)  # evenly spaced
    for changes, kept in (({}, [0, 1, 2, 3, 4]), ({"top_k": 3}, [0, 2, 4]), ({"top_p": 0.7}, [0, 4])):
        chosen = choose(logits.expand(1000, -1), decoding(temperature=0.7, **changes), luck)
        share = torch.bincount(chosen, minlength=5) / 1000
        wanted = torch.zeros(5)
        wanted[kept] = (logits[0, kept] / 0.7).softmax(-1)
        torch.testing.assert_close(share, wanted, rtol=0, atol=0.002)
