"""The loss of distillation against torch's KL divergence and autograd in float64, with all logits at once.

The generalized Jensen-Shannon divergence is that of GKD (arXiv 2306.13649), whose beta TRL's GKDTrainer shares: there
beta = 0 and 1 are the two KL divergences, which are kinds of their own here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func  # pyright: ignore[reportPrivateImportUsage]
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from pretune.core.batch import IGNORE
from pretune.objectives.linear_distillation import Mix, Teacher, divergence_from, linear_distillation

KINDS = ("forward_kl", "reverse_kl", "jensen_shannon")
torchs_own = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its compiler does what it deprecates


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bent(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def torchs(log_p: Tensor, log_q: Tensor, mix: Mix) -> Tensor:
    """The divergence of each position."""

    def kl(of: Tensor, relative_to: Tensor) -> Tensor:
        return F.kl_div(relative_to, of, log_target=True, reduction="none").sum(-1)

    if mix.divergence == "forward_kl":
        return kl(log_p, log_q)
    if mix.divergence == "reverse_kl":
        return kl(log_q, log_p)
    m = (mix.beta * log_p.exp() + (1 - mix.beta) * log_q.exp()).log()
    return mix.beta * kl(log_p, m) + (1 - mix.beta) * kl(log_q, m)


def all_at_once(logits: Tensor, theirs: Tensor, targets: Tensor, mix: Mix, tokens: Tensor | None = None) -> Tensor:
    """The loss, cross-entropy and divergence, summed, of logits [N, V] and the teacher's [N, U]."""
    common = min(logits.shape[-1], theirs.shape[-1])
    if tokens is None:
        logs = [(one[:, :common] / mix.temperature).log_softmax(-1) for one in (theirs, logits)]
    else:
        logs = [lumped((one / mix.temperature).softmax(-1), tokens) for one in (theirs, logits)]
    scored = targets != IGNORE
    apart = torchs(logs[0], logs[1], mix)[scored].sum()
    nll = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE)
    return torch.stack([(1 - mix.alpha) * nll + mix.alpha * mix.temperature**2 * apart, nll, apart])


def lumped(probabilities: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of the tokens, and of everything else."""
    kept = probabilities.gather(-1, tokens)
    others = probabilities.scatter(-1, tokens, 0).sum(-1, keepdim=True)
    return torch.cat([kept, others], -1).log()


mixes = st.builds(
    Mix,
    alpha=st.sampled_from([0.3, 1.0]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    divergence=st.sampled_from(KINDS),
    beta=st.sampled_from([0.1, 0.5, 0.9]),
)


@settings(max_examples=80)
@given(data=st.data(), mix=mixes)
def test_equals_torch_in_float64_for_any_shape_and_mask(data: st.DataObject, mix: Mix) -> None:
    vocab, others = data.draw(st.integers(1, 9), label="vocab"), data.draw(st.integers(1, 9), label="teacher's vocab")
    softcaps = [data.draw(st.sampled_from([None, 0.5, 5.0]), label="softcap") for _ in range(2)]
    scored = data.draw(st.lists(st.one_of(st.just(IGNORE), st.integers(0, vocab - 1)), max_size=13), label="targets")
    targets, chunk = torch.tensor(scored, dtype=torch.int64), data.draw(st.integers(1, 15), label="chunk")
    hidden = normal(len(targets), 4, seed=0).requires_grad_()
    weight = normal(vocab + data.draw(st.integers(0, 3), label="padding rows"), 4, seed=1).requires_grad_()
    rows, head = normal(len(targets), 3, seed=2), normal(others + 2, 3, seed=3)

    teacher = Teacher(rows, None, head, softcaps[1], min(vocab, others))
    ours = linear_distillation(hidden, weight, targets, vocab, softcaps[0], teacher, mix, chunk)
    logits, theirs = bent(hidden @ weight[:vocab].T, softcaps[0]), bent(rows @ head[:others].T, softcaps[1])
    wanted = all_at_once(logits, theirs, targets, mix)
    torch.testing.assert_close(torch.stack(ours), wanted)
    for got, expected in zip(
        torch.autograd.grad(ours[0] * 0.7, (hidden, weight)),
        torch.autograd.grad(wanted[0] * 0.7, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


@settings(max_examples=60)
@given(data=st.data(), mix=mixes)
def test_the_likeliest_tokens_and_all_others_as_one(data: st.DataObject, mix: Mix) -> None:
    vocab, kept = 9, data.draw(st.integers(1, 8), label="kept")
    softcap = data.draw(st.sampled_from([None, 2.0]), label="softcap")
    targets = torch.tensor([3, IGNORE, 0, 8, 8, 1, IGNORE])
    hidden, weight = normal(7, 4, seed=0).requires_grad_(), normal(vocab + 1, 4, seed=1).requires_grad_()
    theirs = normal(7, vocab, seed=5)
    tokens = theirs.topk(kept).indices
    log_probs = lumped((theirs / mix.temperature).softmax(-1), tokens)

    teacher = Teacher(log_probs, tokens.int(), None, None, vocab)
    ours = linear_distillation(hidden, weight, targets, vocab, softcap, teacher, mix, 3)
    wanted = all_at_once(bent(hidden @ weight[:vocab].T, softcap), theirs, targets, mix, tokens)
    torch.testing.assert_close(torch.stack(ours), wanted)
    for got, expected in zip(
        torch.autograd.grad(ours[0], (hidden, weight)), torch.autograd.grad(wanted[0], (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_bounded_by_those_over_all_tokens_and_reach_them(kind: str) -> None:
    """Taking outcomes together only loses information; with all but one token kept nothing is lost."""
    theirs, logits, mix = normal(5, 9, seed=5), normal(5, 9, seed=6).float(), Mix(0.5, 1.0, kind, 0.4)
    whole = divergence_from(logits, Teacher(theirs, None, torch.eye(9, dtype=torch.float64), None, 9), mix)
    before = torch.zeros(5)
    for kept in range(1, 9):
        tokens = theirs.topk(kept).indices
        found = divergence_from(logits, Teacher(lumped(theirs.softmax(-1), tokens), tokens, None, None, 9), mix)
        assert (found >= before - 1e-6).all()
        before = found
    torch.testing.assert_close(before, whole.to(before.dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("likeliest", [False, True])
def test_float32_in_chunks_is_float64_at_once(kind: str, likeliest: bool) -> None:
    mix, targets = Mix(0.6, 2.0, kind, 0.3), torch.randint(0, 60, (50,), generator=torch.Generator().manual_seed(4))
    wide = [normal(50, 16, seed=0).requires_grad_(), normal(64, 16, seed=1).requires_grad_()]
    theirs = normal(50, 24, seed=2) @ normal(60, 24, seed=3).T / 4
    tokens = theirs.topk(8).indices if likeliest else None
    wanted = all_at_once(wide[0] @ wide[1][:60].T, theirs, targets, mix, tokens)
    narrow = [tensor.detach().float().requires_grad_() for tensor in wide]
    teacher = Teacher(normal(50, 24, seed=2, dtype=torch.float32), None, normal(60, 24, seed=3).float() / 4, None, 60)
    if tokens is not None:
        teacher = Teacher(lumped((theirs / 2).softmax(-1), tokens).float(), tokens.int(), None, None, 60)
    ours = linear_distillation(narrow[0], narrow[1], targets, 60, None, teacher, mix, 16)
    torch.testing.assert_close(torch.stack(ours).double(), wanted, rtol=1e-5, atol=1e-5)
    gradients = zip(torch.autograd.grad(ours[0], narrow), torch.autograd.grad(wanted[0], wide), strict=True)
    for got, expected in gradients:
        assert (got - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    targets, mix = torch.tensor([1, IGNORE, 0, 4, 2]), Mix(0.7, 1.5, kind, 0.25)
    hidden, weight = normal(5, 3, seed=0).requires_grad_(), normal(6, 3, seed=1).requires_grad_()
    teacher = Teacher(normal(5, 2, seed=2), None, normal(5, 2, seed=3), None, 5)
    torch.autograd.gradcheck(
        lambda h, w: linear_distillation(h, w, targets, 5, 3.0, teacher, mix, 2)[0], (hidden, weight)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_as_large_at_any_temperature(kind: str) -> None:
    """Hinton's reason for the square: where logits are small beside the temperature, it cancels."""
    sizes = []
    for temperature in (50.0, 200.0):
        hidden, weight = normal(6, 4, seed=0).requires_grad_(), normal(9, 4, seed=1)
        teacher = Teacher(normal(6, 4, seed=2), None, weight, None, 9)
        mix = Mix(1.0, temperature, kind, 0.5)
        loss, *_ = linear_distillation(hidden, weight, torch.arange(6), 9, None, teacher, mix, 4)
        sizes.append(torch.autograd.grad(loss, hidden)[0].norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_a_model_that_is_its_teacher_has_no_divergence_and_the_text_alone_moves_it() -> None:
    hidden, weight = normal(6, 4, seed=0).requires_grad_(), normal(9, 4, seed=1)
    targets = torch.tensor([1, 2, IGNORE, 4, 5, 8])
    nll = F.cross_entropy(hidden @ weight.T, targets, reduction="sum", ignore_index=IGNORE)
    for kind in KINDS:
        teacher = Teacher(hidden.detach(), None, weight, None, 9)
        loss, cross_entropy, apart = linear_distillation(
            hidden, weight, targets, 9, None, teacher, Mix(0.4, 2.0, kind, 0.5), 4
        )
        assert apart.item() == pytest.approx(0, abs=1e-12)
        torch.testing.assert_close(cross_entropy, nll.detach())
        torch.testing.assert_close(
            torch.autograd.grad(loss, hidden)[0], 0.6 * torch.autograd.grad(nll, hidden, retain_graph=True)[0]
        )


@pytest.mark.parametrize("kind", KINDS)
def test_distributions_of_one_token_each_stay_finite(kind: str) -> None:
    """Logits 300 apart: probabilities that float32 has no number for."""
    hidden, weight = (300 * normal(8, 16, seed=0, dtype=torch.float32)).requires_grad_(), normal(20, 16, seed=1).float()
    teacher = Teacher(300 * normal(8, 16, seed=2).float(), None, weight, None, 20)
    loss, *_ = linear_distillation(hidden, weight, torch.arange(8), 20, None, teacher, Mix(0.5, 1.0, kind, 0.5), 3)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, hidden)[0].isfinite().all()


def test_a_position_that_is_not_scored_may_hold_anything() -> None:
    hidden = normal(3, 4, seed=0, dtype=torch.float32)
    hidden[1] = torch.inf
    hidden.requires_grad_()
    weight, rows = normal(8, 4, seed=1).float(), normal(3, 2, seed=2).float()
    rows[1] = torch.nan
    teacher = Teacher(rows, None, normal(8, 2, seed=3).float(), None, 8)
    mix = Mix(0.5, 1.0, "jensen_shannon", 0.5)
    loss, *_ = linear_distillation(hidden, weight, torch.tensor([2, IGNORE, 3]), 8, None, teacher, mix, 3)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, hidden)[0].isfinite().all()


POSITIONS, DIM, VOCAB, PADDED, CHUNK = 22, 8, 29, 32, 8


def case(likeliest: bool) -> tuple[Tensor, Tensor, Tensor, Teacher]:
    hidden, weight = normal(POSITIONS, DIM, seed=0).float(), normal(PADDED, DIM, seed=1).float()
    targets = torch.randint(0, VOCAB, (POSITIONS,), generator=torch.Generator().manual_seed(2))
    targets[torch.arange(0, POSITIONS, 4)] = IGNORE
    rows, head = normal(POSITIONS, 6, seed=3).float(), normal(PADDED, 6, seed=4).float()
    if not likeliest:
        return hidden, weight, targets, Teacher(rows, None, head, None, VOCAB)
    logits = rows @ head[:VOCAB].T
    tokens = logits.topk(3).indices
    return hidden, weight, targets, Teacher(lumped(logits.softmax(-1), tokens).half(), tokens.int(), None, None, VOCAB)


@torchs_own
@pytest.mark.parametrize("likeliest", [False, True])
@pytest.mark.parametrize(("kind", "bfloat16"), [("forward_kl", False), ("reverse_kl", True), ("jensen_shannon", False)])
def test_compiled_equals_eager_a_chunk_at_a_time(likeliest: bool, kind: str, bfloat16: bool) -> None:
    hidden, weight, targets, teacher = case(likeliest)
    hidden.requires_grad_()
    weight.requires_grad_()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def loss(hidden: Tensor, weight: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        said = Teacher(rows, teacher.tokens, teacher.head, None, VOCAB)
        return linear_distillation(hidden, weight, targets, VOCAB, 4.0, said, Mix(0.5, 2.0, kind, 0.3), CHUNK)

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, dynamic=False, backend=backend)):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            values = function(hidden, weight, teacher.rows)
        results.append([*values, *torch.autograd.grad(values[0], (hidden, weight))])
    for eager, compiled in zip(*results, strict=True):
        # In bfloat16 the compiler leaves out roundings between operations.
        tolerance = 0.03 if bfloat16 else 1e-5
        torch.testing.assert_close(compiled, eager, rtol=tolerance, atol=tolerance)
    nodes = [node.meta["val"] for graph in graphs for node in graph.graph.nodes if "val" in node.meta]
    largest = max(tensor.numel() for tensor in nodes if isinstance(tensor, Tensor))
    assert largest == PADDED * DIM < POSITIONS * VOCAB, "a head or its gradient"


def test_what_the_compiler_is_told_about_the_operator_is_true() -> None:
    for likeliest in (False, True):
        hidden, weight, targets, teacher = case(likeliest)
        given = (hidden, weight, targets, teacher.rows, teacher.tokens, teacher.head)
        options = (VOCAB, None, None, VOCAB, 0.5, 1.0, "reverse_kl", 0.5, CHUNK)
        for needs in ((True, True), (True, False), (False, True), (False, False)):
            torch.library.opcheck(
                torch.ops.pretune.chunked_distillation.default,
                (*given, *options, *needs, False),
                test_utils=("test_schema", "test_faketensor"),
            )


def test_a_published_value() -> None:
    """KL and Jensen-Shannon of two coins, by hand."""
    p, q = 0.8, 0.5
    log_p, logits = torch.tensor([[math.log(p), math.log(1 - p)]]), torch.zeros(1, 2)
    teacher = Teacher(log_p, None, torch.eye(2), None, 2)

    def kl(a: float, b: float) -> float:
        return a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))

    wanted = {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jensen_shannon": 0.1 * kl(p, 0.1 * p + 0.9 * q) + 0.9 * kl(q, 0.1 * p + 0.9 * q),
    }
    for kind, value in wanted.items():
        assert divergence_from(logits, teacher, Mix(0.5, 1.0, kind, 0.1)).item() == pytest.approx(value, rel=1e-5)
