"""Flex attention on a GPU, which skips masked blocks, against attention with the same mask written out."""

from __future__ import annotations

import pytest
import torch
from card import CARD, ON_THE_CARD, assert_near
from tiny import document_ids
from torch import Tensor

from pretune.model.attention import attend, mask_of

# torch's kernel needs more shared memory than older cards have.
pytestmark = [*ON_THE_CARD, pytest.mark.gpu(capability=(8, 0))]
LENGTH = 300  # two blocks of 128 and part of a third


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize(("isolated", "window"), [(True, None), (True, 70), (False, 70)])
def test_outputs_and_gradients_equal_the_dense_masks(isolated: bool, window: int | None, num_kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, LENGTH, 64, generator=generator).to(CARD).requires_grad_()
        for heads in (4, num_kv_heads, num_kv_heads)
    )
    weights = torch.randn(2, 4, LENGTH, 64, generator=generator).to(CARD)
    tokens = torch.zeros(2, LENGTH, dtype=torch.int64, device=CARD)
    ids = document_ids(2, LENGTH).to(CARD) if isolated else None

    def attention(q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None, skipping: bool) -> Tensor:
        return attend(q, k, v, mask_of(tokens, ids, window, skipping), 0.125, 0.0)

    wanted = attention(q, k, v, ids, False)
    found = torch.compile(attention, fullgraph=True, dynamic=False)(q, k, v, ids, True)
    assert_near(found, wanted, "outputs")
    references = torch.autograd.grad((wanted * weights).sum(), (q, k, v))
    for name, *pair in zip("qkv", torch.autograd.grad((found * weights).sum(), (q, k, v)), references, strict=True):
        assert_near(*pair, f"gradient of {name}")
