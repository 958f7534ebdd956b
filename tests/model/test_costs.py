"""Counts of parameters and operations, against the model itself and torch's own counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretune.model.attention import KVCache
from pretune.model.costs import (
    cache_bytes_per_token,
    forward_flops,
    matrix_parameters,
    parameters_by_part,
    skeleton,
    training_flops,
)
from pretune.model.counts import count_parameters

SHAPES: list[dict[str, Any]] = [
    {},
    {"tied_embeddings": False, "activation": "relu_squared"},
    {"num_layers": 3, "dim": 40, "head_dim": 16, "mlp_dim": 100, "vocab_size": 200, "vocab_multiple_of": 64},
    {"qk_norm": True, "bias": {"qkv": True, "attention_output": True, "mlp": True}},
]


@pytest.mark.parametrize("changes", SHAPES)
def test_operations_are_those_that_torch_counts(changes: dict[str, Any]) -> None:
    # Attention is spelled out, so that its backward pass is counted as the two products that it is: fused kernels
    # compute the scores again.
    model, tokens = tiny_model(**changes), torch.zeros(3, 32, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        hidden = model(tokens)
        logits = hidden @ model.head_weight.T
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert forward.get_total_flops() == forward_flops(model, 32) * tokens.numel()
    assert forward.get_total_flops() + backward.get_total_flops() == training_flops(model, 32) * tokens.numel()


@pytest.mark.parametrize("changes", SHAPES)
def test_parts_sum_to_the_model(changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    parts = parameters_by_part(model)
    assert sum(parts.values()) == count_parameters(model).total
    assert parts == parameters_by_part(skeleton(tiny_config(**changes)))
    assert ("head" in parts) == (not changes.get("tied_embeddings", True))
    assert parts["embedding"] == model.config.padded_vocab_size * model.config.dim


def test_a_skeleton_takes_no_memory() -> None:
    assert all(parameter.is_meta for parameter in skeleton(tiny_config(dim=8192, mlp_dim=65536)).parameters())


def test_frozen_weights_cost_less() -> None:
    model = tiny_model()
    everything, (matrices, trained) = training_flops(model, 32), matrix_parameters(model)
    assert matrices == trained
    model.requires_grad_(False)
    assert everything - training_flops(model, 32) == 2 * matrices


def test_cached_bytes_are_those_of_the_cache() -> None:
    config = tiny_config(num_kv_heads=2)
    cache = KVCache(config, torch.zeros(1, dtype=torch.int64), 10, torch.bfloat16)
    assert sum(one.nbytes for one in cache._keys + cache._values) == 10 * cache_bytes_per_token(config, 2)
