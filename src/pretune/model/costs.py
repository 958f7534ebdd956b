"""The cost of a transformer: parameters by part, and floating-point operations per token.

L layers, H query heads, K head width, T tokens per row (or window), N parameters in matrices.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from pretune.model.build import Model, new_model
from pretune.model.section import AnyModelConfig
from pretune.model.transformers_model import costs as of_transformers
from pretune.model.transformers_model.config import TransformersConfig
from pretune.model.transformers_model.model import TransformersModel


def skeleton(config: AnyModelConfig) -> Model:
    """The model on the meta device: names and shapes of all tensors, but no values and no memory."""
    with torch.device("meta"):
        return new_model(config)


def parameters_by_part(model: Model) -> dict[str, int]:
    """Parameters in embedding, value and position embedding, attention, mlp, head, and norms and scalars; empty parts
    are left out, and tied tables are counted once, as embedding."""
    if isinstance(model, TransformersModel):
        return of_transformers.parameters_by_part(model)
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        owners = {"attention", "mlp", "embedding", "head", "value_embedding", "position_embedding"}.intersection(
            name.split(".")
        )
        part = max(owners).replace("_", " ") if owners and parameter.ndim > 1 else "norms and scalars"
        parts[part] += parameter.numel()
    return dict(parts)


def matrix_parameters(model: Model) -> tuple[int, int]:
    """The number of parameters that every token is multiplied with, and how many of them are trained.

    The head counts, tied or not; a table that is only looked up does not.
    """
    if isinstance(model, TransformersModel):
        shares = [(one.numel() * share, one.requires_grad) for one, share in of_transformers.matrices(model)]
        return round(sum(size for size, _ in shares)), round(sum(size for size, trained in shares if trained))
    weights = [module.weight for module in model.layers.modules() if isinstance(module, nn.Linear)]
    weights.append(model.head_weight)  # type: ignore[arg-type]
    return sum(one.numel() for one in weights), sum(one.numel() for one in weights if one.requires_grad)


def forward_flops(model: Model, sequence_length: int) -> float:
    """Operations of a forward pass, including the head, per token of a row of `sequence_length`: 2 N + 4 L H K T."""
    matrices, _ = matrix_parameters(model)
    return forward_flops_of(matrices, _section(model), sequence_length)


def forward_flops_of(matrices: int, config: AnyModelConfig, sequence_length: int) -> float:
    """The same, of a model of which the parameters of its matrices are known."""
    return 2 * matrices + 4 * _attention_width(config, sequence_length)


def training_flops(model: Model, sequence_length: int) -> float:
    """Operations of a training step per token: 6 N + 12 L H K T (PaLM, arXiv:2204.02311, appendix B).

    A multiplication and an addition count as two. Of the 6 N, 2 N are the forward pass, 2 N the gradient of inputs and
    2 N the gradient of weights, which frozen weights (adapters) do not need. Attention is counted as if every token saw
    the whole row: that is the convention (PaLM, nanoGPT, llm.c), although a causal kernel needs only half; layers with
    a window count the window. Embedding lookups, norms, activations, softmax and the update are not counted, nor is
    recomputation.
    """
    matrices, trained = matrix_parameters(model)
    return training_flops_of(matrices, trained, _section(model), sequence_length)


def training_flops_of(matrices: int, trained: int, config: AnyModelConfig, sequence_length: int) -> float:
    """The same, of a model of which the parameters of its matrices are known, and how many of them are trained."""
    return 4 * matrices + 2 * trained + 12 * _attention_width(config, sequence_length)


def _section(model: Model) -> AnyModelConfig:
    return model.section if isinstance(model, TransformersModel) else model.config


def _attention_width(config: AnyModelConfig, sequence_length: int) -> int:
    """H K times the number of attended tokens, summed over layers: L H K T without windows."""
    if isinstance(config, TransformersConfig):
        return of_transformers.attention_width(config, sequence_length)
    windows = (config.window_of(layer) or sequence_length for layer in range(config.num_layers))
    return config.num_heads * config.head_dim * sum(min(window, sequence_length) for window in windows)


def inference_bytes(config: AnyModelConfig, parameters: int, context: int) -> int:
    """Bytes to generate one text of `context` tokens, prompt included: weights, keys and values in 16 bits, and a row
    of logits in float32."""
    return 2 * parameters + cache_bytes_per_token(config, 2) * context + 4 * config.vocab_size


def cache_bytes_per_token(config: AnyModelConfig, itemsize: int) -> int:
    """Bytes per token of the key-value cache."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
