"""Attention of long rows in parts, against the mask written out."""

from __future__ import annotations

import pytest
import torch
from tiny import document_ids, tiny_model
from torch import Tensor

from pretune.core.batch import Batch
from pretune.model.attention import Logits, attend, mask_of
from pretune.model.long_rows import BLOCK, LONG, Parts, attends_in_parts
from pretune.model.transformer import Transformer
from pretune.objectives.language_modeling import language_modeling

LENGTH = 2 * BLOCK + 130


def heads(dtype: torch.dtype, num_kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (4, num_kv_heads, num_kv_heads)
    drawn = (torch.randn(2, LENGTH, size, 16, generator=generator, dtype=torch.float64) for size in sizes)
    return [one.to(dtype).transpose(1, 2).requires_grad_() for one in drawn]


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 1, 70, BLOCK + 3])
@pytest.mark.parametrize("documents", ["one", "many", "one long and many"])
def test_outputs_and_gradients_are_those_of_the_dense_mask(
    documents: str, window: int | None, num_kv_heads: int
) -> None:
    ids = document_ids(2, LENGTH)
    if documents == "one":
        ids = torch.zeros_like(ids)
    elif documents == "one long and many":
        ids[:, : BLOCK + 200] = 0
    tokens, drawn = torch.zeros(2, LENGTH, dtype=torch.int64), heads(torch.float64, num_kv_heads)
    weights = torch.linspace(-1, 1, LENGTH, dtype=torch.float64)[:, None]
    results = []
    for mask in (Parts(ids, window), mask_of(tokens, ids, window, False)):
        y = attend(*drawn, mask, Logits(0.3, None), 0.0)
        results.append((y, *torch.autograd.grad((y.square() * weights).sum(), drawn)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_rounds_as_torchs_kernel_does_in_bf16() -> None:
    ids, tokens, drawn = document_ids(2, LENGTH), torch.zeros(2, LENGTH, dtype=torch.int64), heads(torch.bfloat16, 2)
    exact = attend(*(one.double() for one in drawn), mask_of(tokens, ids, None, False), Logits(0.3, None), 0.0)
    errors = [
        (attend(*drawn, mask, Logits(0.3, None), 0.0).double() - exact).abs().mean().item()
        for mask in (Parts(ids, None), mask_of(tokens, ids, None, False))
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


def test_what_the_compiler_is_told_about_the_operators_is_true() -> None:
    drawn, ids = [one.detach() for one in heads(torch.float32, 2)], document_ids(2, LENGTH)
    y, normalizer = torch.ops.pretune.attention_in_parts(*drawn, ids, 70, 0.3)
    checks = ("test_schema", "test_faketensor")
    forward, backward = torch.ops.pretune.attention_in_parts, torch.ops.pretune.attention_in_parts_backward
    torch.library.opcheck(forward.default, (*drawn, ids, 70, 0.3), test_utils=checks)
    torch.library.opcheck(backward.default, (y, *drawn, y, normalizer, ids, 70, 0.3), test_utils=checks)


def test_rows_are_taken_apart_where_torchs_kernel_needs_a_mask() -> None:
    row = torch.zeros(1, LONG, dtype=torch.int64)
    assert attends_in_parts(row, 0.0, None)
    assert not attends_in_parts(row[:, 1:], 0.0, None), "short"
    assert not attends_in_parts(row, 0.1, None), "dropout"
    assert not attends_in_parts(row, 0.0, 20.0), "softcap"
    assert not attends_in_parts(row.to("meta"), 0.0, None), "not on a CPU"


class Dense(Transformer):
    """With a mask of [T, T], whatever the length."""

    def _mask(self, tokens: Tensor, document_ids: Tensor | None, window: int | None) -> Tensor | None:
        mask = mask_of(tokens, document_ids, window, False)
        assert mask is None or isinstance(mask, Tensor)
        return mask


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_learns_the_same_and_makes_no_tensor_of_length_squared(compiled: bool) -> None:
    model = tiny_model(
        num_layers=2, window={"size": 70, "pattern": "SL", "full_last_layer": True}, max_sequence_length=LONG
    ).train()
    tokens = torch.randint(0, 61, (2, LONG + 1), generator=torch.Generator().manual_seed(0))
    data = Batch(tokens[:, :-1], tokens[:, 1:], document_ids(2, LONG))

    def gradients() -> list[Tensor]:
        largest.clear()
        loss = step(model, data, 4096)
        return list(torch.autograd.grad(loss, [one for one in model.parameters() if one.requires_grad]))

    largest: list[int] = []
    step = language_modeling
    if compiled:
        torch.compiler.reset()
        step = torch.compile(language_modeling, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.autograd.graph.saved_tensors_hooks(lambda one: largest.append(one.numel()) or one, lambda one: one):
        found = gradients()
        assert max(largest) < LONG * LONG
    model.__class__ = Dense
    for one, expected in zip(found, gradients(), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-3)
