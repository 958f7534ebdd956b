"""Adapters on a GPU against peft's own layers there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapted import FORMS, of_form, perturb, use_layers_of_peft
from card import CARD, ON_THE_CARD, assert_near
from tiny import tiny_model
from torch import Tensor

from pretune.adapters.attach import attach
from pretune.model.transformer import Transformer

pytestmark = ON_THE_CARD


def adapted(form: str) -> Transformer:
    """A model with an adapter that has been moved from where it starts, unless that depends on the weights."""
    model = tiny_model()
    attach(model, of_form(form), seed=3)
    perturb(model, scale=0.0 if "pissa" in form else 0.1)
    return model.to(CARD)


def results(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    """Logits, and the gradients of the adapter."""
    logits = model.unembed(model(tokens[:, :-1]))
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()))
    return {"logits": logits, **dict(zip(trained, gradients, strict=True))}


@pytest.mark.parametrize("form", FORMS)
def test_forward_and_gradients_equal_pefts(form: str) -> None:
    tokens = torch.randint(0, 61, (3, 33), generator=torch.Generator().manual_seed(1)).to(CARD)
    model, reference = adapted(form), adapted(form)
    use_layers_of_peft(reference)
    found, wanted = results(model, tokens), results(reference, tokens)
    assert found.keys() == wanted.keys()
    for name in found:
        assert_near(found[name], wanted[name], name)
