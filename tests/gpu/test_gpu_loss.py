"""The chunked loss, compiled for a GPU, against torch's own in float64 on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from card import CARD, ON_THE_CARD, assert_near
from torch import Tensor

from pretune.core.batch import IGNORE
from pretune.objectives.cross_entropy import linear_cross_entropy, linear_token_losses

pytestmark = ON_THE_CARD
POSITIONS, DIM, VOCAB, PADDED, CHUNK = 300, 64, 250, 256, 128


def exact_losses(hidden: Tensor, head: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """The loss of each position."""
    logits = hidden @ head[:VOCAB].T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE)


@pytest.mark.parametrize("head_learns", [True, False], ids=["", "frozen head"])
@pytest.mark.parametrize("softcap", [None, 8.0], ids=["", "softcap"])
@pytest.mark.parametrize("each_position", [False, True], ids=["sum", "each position"])
def test_it_equals_torchs_in_float64(each_position: bool, softcap: float | None, head_learns: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(rows, DIM, generator=generator) for rows in (POSITIONS, PADDED))
    head /= 4  # logits of the size that a trained model has
    targets = torch.randint(0, VOCAB, (POSITIONS,), generator=generator)
    targets = targets.masked_fill(torch.rand(POSITIONS, generator=generator) < 0.3, IGNORE)
    weights = torch.linspace(-1, 2, POSITIONS) if each_position else torch.ones(POSITIONS)

    def loss(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        if each_position:
            return linear_token_losses(hidden, head, targets, VOCAB, softcap, CHUNK) @ weights
        return linear_cross_entropy(hidden, head, targets, VOCAB, softcap, CHUNK)

    ours = [hidden.to(CARD).requires_grad_(), head.to(CARD).requires_grad_(head_learns)]
    theirs = [hidden.double().requires_grad_(), head.double().requires_grad_(head_learns)]
    found = torch.compile(loss, fullgraph=True, dynamic=False)(*ours, targets.to(CARD), weights.to(CARD))
    wanted = exact_losses(*theirs, targets, softcap) @ weights.double()
    assert_near(found, wanted, "loss")
    results = [
        torch.autograd.grad(value, [tensor for tensor in tensors if tensor.requires_grad])
        for value, tensors in ((found, ours), (wanted, theirs))
    ]
    for name, *gradients in zip(("hidden", "head"), *results, strict=False):
        assert_near(*gradients, name)
