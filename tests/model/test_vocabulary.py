"""Rows for more tokens: what the model knew stays as it was, in every table, whatever the padding."""

from __future__ import annotations

import pytest
import torch
from library_models import library_model
from tiny import tiny_model

from pretune.model.vocabulary import add_tokens, resize

OLD = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("tied", [True, False])
def test_old_tokens_are_as_before_and_new_ones_at_their_mean(tied: bool, multiple: int) -> None:
    model = tiny_model(tied_embeddings=tied, vocab_multiple_of=multiple, value_embeddings=True)
    with torch.no_grad():
        before, hidden = model.unembed(model(OLD)), model(OLD)
        add_tokens(model, 66, range(61, 66))
        after = model.unembed(model(OLD))
    assert model.config.vocab_size == 66
    torch.testing.assert_close(model(OLD), hidden, rtol=0, atol=0)
    torch.testing.assert_close(after[..., :61], before, rtol=0, atol=1e-6)
    torch.testing.assert_close(after[..., 61:], before.mean(-1, keepdim=True).expand(-1, -1, 5), rtol=0, atol=1e-5)
    tables = [one for name, one in model.named_parameters() if "embedding.weight" in name or name == "head.weight"]
    assert len(tables) == (2 if tied else 3), "the value embedding too"
    for table in tables:
        assert len(table) == model.config.padded_vocab_size
        assert table.requires_grad
        assert not table[66:].any()
        torch.testing.assert_close(table[61:66], table[:61].mean(0).expand(5, -1))


def test_fewer_rows_and_again_more() -> None:
    model = tiny_model(vocab_multiple_of=16)
    table = model.embedding.weight.detach().clone()
    resize(model, 40)
    assert (model.config.vocab_size, len(model.embedding.weight), model.embedding.num_embeddings) == (40, 48, 48)
    resize(model, 61)
    assert torch.equal(model.embedding.weight[:40], table[:40])


@pytest.mark.parametrize(("kind", "tied"), [("mixtral", False), ("opt", True), ("phi", False), ("phi", True)])
def test_a_model_of_transformers_grows_likewise(kind: str, tied: bool) -> None:
    """phi's head has a bias."""
    model = library_model(kind, tie_word_embeddings=tied)
    with torch.no_grad():
        before, hidden = model.unembed(model(OLD)), model(OLD)
        add_tokens(model, 106, range(101, 106))
        after = model.unembed(model(OLD))
    assert (model.config.vocab_size, model.section.vocab_size, model.inner.config.vocab_size) == (106, 106, 106)
    torch.testing.assert_close(model(OLD), hidden, rtol=0, atol=0)
    torch.testing.assert_close(after[..., :101], before, rtol=0, atol=1e-6)
    torch.testing.assert_close(after[..., 101:], before.mean(-1, keepdim=True).expand(-1, -1, 5), rtol=0, atol=1e-5)
    assert (model.head.weight is model.embedded.weight) is tied
    assert model.embedded.weight.requires_grad
