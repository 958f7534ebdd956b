"""Noise on embeddings: its size, when it applies, and that a compiled model has it too."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from pretune.training.neftune import add_embedding_noise


def test_noise_is_uniform_and_of_the_papers_size() -> None:
    table = torch.nn.Embedding(50, 64)
    add_embedding_noise(table, 5.0)
    tokens = torch.zeros(8, 100, dtype=torch.int64)
    torch.manual_seed(0)
    noise = (table(tokens) - table.weight[0]).detach()
    limit = 5 / (100 * 64) ** 0.5
    assert 0.999 * limit < noise.abs().max() <= limit * (1 + 1e-5)
    # Standard deviation of a uniform distribution, mean zero; drawn independently for each value.
    assert noise.std().item() == pytest.approx(limit / 3**0.5, rel=0.01)
    assert abs(noise.mean().item()) < 0.01 * limit
    assert len(noise.unique()) > 0.9 * noise.numel()
    torch.manual_seed(0)
    assert torch.equal(noise, (table(tokens) - table.weight[0]).detach())


def test_there_is_none_in_evaluation_nor_without_gradients() -> None:
    plain, noisy = tiny_model(), tiny_model()
    add_embedding_noise(noisy.embedding, 5.0)
    tokens = torch.arange(20)[None]
    with torch.no_grad():  # a frozen reference, even in training mode
        assert torch.equal(noisy(tokens), plain(tokens))
    assert not torch.equal(noisy(tokens), plain(tokens))
    noisy.eval()
    assert torch.equal(noisy(tokens), plain(tokens))
    # The head, which is tied to the embedding, gets no noise.
    assert torch.equal(noisy.train().unembed(torch.ones(1, 32)), plain.unembed(torch.ones(1, 32)))


def test_the_gradient_of_the_embedding_is_as_without() -> None:
    table = torch.nn.Embedding(5, 8)
    add_embedding_noise(table, 3.0)
    table(torch.tensor([[1, 1, 2]])).sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad[:, 0].tolist() == [0, 2, 1, 0, 0]


def test_a_compiled_model_has_it_and_draws_anew_each_time() -> None:
    plain, noisy = tiny_model(num_layers=1), tiny_model(num_layers=1)
    add_embedding_noise(noisy.embedding, 5.0)
    compiled, tokens = torch.compile(lambda rows: noisy(rows), dynamic=False), torch.arange(20)[None]
    torch.manual_seed(0)
    first, second = compiled(tokens), compiled(tokens)
    torch.manual_seed(0)
    assert torch.equal(compiled(tokens), first)
    assert not torch.equal(first, second)
    noisy.eval()
    torch.testing.assert_close(compiled(tokens), plain.eval()(tokens), rtol=1e-4, atol=1e-5)
