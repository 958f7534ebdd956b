"""The training loss and the scores of evaluation: what they sum, and where they agree."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model

from pretune.core.batch import IGNORE, Batch
from pretune.objectives.language_modeling import language_modeling, score_tokens, token_scorer


def batch(rows: int = 4, length: int = 16) -> Batch:
    tokens = torch.randint(0, 61, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    targets = tokens[:, 1:].clone()
    targets[0, :5] = targets[1] = IGNORE
    ids = (torch.arange(length, dtype=torch.int32) // 6).expand(rows, length).contiguous()
    return Batch(tokens[:, :-1].contiguous(), targets, ids)


@pytest.mark.parametrize("changes", [{}, {"softcap": 5.0, "vocab_multiple_of": 64, "tied_embeddings": False}])
def test_loss_is_the_sum_over_scored_tokens(changes) -> None:
    model, data = tiny_model(**changes), batch()
    logits = model.unembed(model(data.inputs, data.document_ids))
    wanted = F.cross_entropy(logits.flatten(0, 1), data.targets.flatten(), reduction="sum", ignore_index=IGNORE)
    parameters = list(model.parameters())
    loss = language_modeling(model, data, chunk_tokens=10)
    torch.testing.assert_close(loss, wanted)
    gradients, references = torch.autograd.grad(loss, parameters), torch.autograd.grad(wanted, parameters)
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5 * reference.abs().max().item())


def test_rows_add_up_whatever_the_micro_batch() -> None:
    model, data = tiny_model(), batch()
    whole = language_modeling(model, data, chunk_tokens=64)
    parts = sum(language_modeling(model, data.part(row, row + 1), chunk_tokens=7) for row in range(4))
    torch.testing.assert_close(parts, whole)


def test_scores_agree_with_the_loss_and_ignore_what_is_not_scored() -> None:
    model, data = tiny_model(softcap=5.0, vocab_multiple_of=64), batch()
    scores = score_tokens(model, data, chunk_tokens=10)
    torch.testing.assert_close(scores.nll.sum(), language_modeling(model, data, chunk_tokens=64))
    logits = model.unembed(model(data.inputs, data.document_ids))
    assert torch.equal(scores.correct, logits.argmax(-1) == data.targets)
    assert not scores.nll[data.targets == IGNORE].any()
    assert not scores.nll.requires_grad
    assert scores.nll.shape == scores.correct.shape == (4, 16)


torchs_own = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its compiler does what it deprecates


@torchs_own
def test_compiled_equals_eager() -> None:
    model, data = tiny_model(num_layers=1, qk_norm=True), batch(2, 8)
    eager = language_modeling(model, data, chunk_tokens=8)
    compiled = torch.compile(language_modeling, fullgraph=True, dynamic=False)(model, data, chunk_tokens=8)
    torch.testing.assert_close(compiled, eager)
    parameters = list(model.parameters())
    gradients, references = torch.autograd.grad(compiled, parameters), torch.autograd.grad(eager, parameters)
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5 * reference.abs().max().item())


@torchs_own
def test_compiled_as_one_graph_and_never_again() -> None:
    model, packed = tiny_model(), batch()
    plain = Batch(packed.inputs, packed.targets, None)
    # Tracing does not depend on the code generator, which takes most of the time.
    compiled = partial(torch.compile, fullgraph=True, dynamic=False, backend="aot_eager")
    loss_of, scores_of = compiled(language_modeling), token_scorer(10, compiled)

    def round_trip(data: Batch) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model.train(), data, 10)
            scores = scores_of(model.eval(), data)
        loss.backward()
        assert scores.nll.sum().item() == pytest.approx(loss.item(), rel=2e-3)

    for data in (plain, packed):
        round_trip(data)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for data in (packed, plain):
            round_trip(Batch(data.inputs.roll(1, 0), data.targets.roll(1, 0), data.document_ids))


def test_only_scored_positions_get_logits() -> None:
    model, data = tiny_model(), batch()
    unembedded = []
    unembed = model.unembed
    model.unembed = lambda hidden: unembedded.append(len(hidden)) or unembed(hidden)  # type: ignore[method-assign,func-returns-value]
    score_tokens(model, data, chunk_tokens=10)
    scored = data.num_scored()
    assert 0 < scored < data.targets.numel()
    assert unembedded == [10] * (scored // 10) + [scored % 10] * (scored % 10 > 0)
