"""The model and its loss on a GPU, against float64 on the CPU and against transformers on the same GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from card import CARD, ON_THE_CARD, assert_near
from tiny import FAMILY_SWITCHES, document_ids, tiny_model, transformers_llama
from torch import Tensor, nn

from pretune.compute.compilation import compile_step
from pretune.core.batch import IGNORE, Batch
from pretune.model.huggingface.weights import to_huggingface
from pretune.model.transformer import Transformer
from pretune.objectives.language_modeling import language_modeling

pytestmark = ON_THE_CARD
LENGTH = 160  # a block of 128, and part of a second
SIZES: dict[str, Any] = {"dim": 64, "head_dim": 16, "mlp_dim": 96, "max_sequence_length": LENGTH}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "grouped heads, qk_norm, relu_squared": {
        "num_kv_heads": 2,
        "qk_norm": True,
        "activation": "relu_squared",
        "tied_embeddings": False,
    },
    "windows, documents apart": {"num_kv_heads": 2, "window": {"size": 40, "pattern": "SL", "full_last_layer": True}},
    "gemma2: attention softcaps": FAMILY_SWITCHES["gemma2"],
}
both_ways = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


def batch(isolated: bool) -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 61, (2, LENGTH + 1), generator=generator)
    targets = tokens[:, 1:].masked_fill(torch.rand(2, LENGTH, generator=generator) < 0.2, IGNORE)
    return Batch(tokens[:, :-1].contiguous(), targets, document_ids(2, LENGTH) if isolated else None)


def loss_of(model: Transformer, compiled: bool) -> Callable[[Batch], Tensor]:
    def loss(data: Batch) -> Tensor:
        return language_modeling(model, data, 128)

    return compile_step(loss) if compiled else loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@both_ways
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_equal_float64_on_the_cpu(shape: str, compiled: bool) -> None:
    model, data = tiny_model(**SIZES, **SHAPES[shape]), batch("documents" in shape)
    exact = copy.deepcopy(model).double()
    wanted = loss_of(exact, False)(data)
    wanted.backward()

    model.to(CARD)
    found = loss_of(model, compiled)(data.to(CARD))
    found.backward()
    assert_near(found, wanted, "loss")
    references = gradients(exact)
    assert gradients(model).keys() == references.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients(model).items():
        assert_near(gradient, references[name], name)


@both_ways
def test_logits_and_gradients_equal_transformers(compiled: bool) -> None:
    model, data = tiny_model(**SIZES), batch(False).to(CARD)
    reference = transformers_llama(model).to(CARD)
    model.to(CARD)
    wanted = reference(data.inputs).logits
    assert_near(model.unembed(model(data.inputs)), wanted, "logits")

    loss_of(model, compiled)(data).backward()
    F.cross_entropy(wanted.flatten(0, 1), data.targets.flatten(), reduction="sum", ignore_index=IGNORE).backward()
    references = gradients(reference)
    converted = to_huggingface(gradients(model), model.config)
    assert converted.keys() == references.keys()
    for name, gradient in converted.items():
        assert_near(gradient, references[name], name)
