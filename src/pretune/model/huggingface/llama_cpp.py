"""What llama.cpp's converter (convert_hf_to_gguf.py) makes of an exported folder.

It chooses the mathematics by the architecture's name alone: it ignores `hidden_act` and always takes the activation of
the architecture's first model. What it needs beyond transformers' files, or must stumble over, is in a file that
transformers does not read: FILE, which matches the converter's pattern `model*.safetensors`.

Source: ggml-org/llama.cpp, conversion/base.py, and of each architecture its file there and in src/models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pretune.model.config import ModelConfig
from pretune.model.huggingface.families import APERTUS, GPT2, LLAMA
from pretune.model.huggingface.fitting import family_of

FILE = "model-llama-cpp.safetensors"

_ACTIVATIONS = {
    "llama": "swiglu",
    "qwen3": "swiglu",
    "arcee": "relu_squared",
    "apertus": "relu_squared",
    "gpt2": "gelu",
}
"""The activation that llama.cpp computes. Apertus has xIELU there, which is relu_squared for the parameters below."""


def is_known(config: ModelConfig) -> bool:
    """Whether it is known here what llama.cpp computes for a portable model's family."""
    return family_of(config).model_type in {*_ACTIVATIONS, "nanochat"}


def obstacle(config: ModelConfig) -> str | None:
    """Why llama.cpp cannot run a portable model of a family that is known; None if it can."""
    family, bias = family_of(config), config.bias
    if family.model_type not in _ACTIVATIONS:
        return f"it has no {family.model_type}"
    if config.activation != _ACTIVATIONS[family.model_type]:
        return f"it would compute {_ACTIVATIONS[family.model_type]} in place of model.activation = {config.activation}"
    scaling = config.rope.scaling
    if scaling is not None and scaling.kind in ("dynamic", "yarn", "longrope"):
        return f"it is not known to stretch positions as model.rope.scaling.kind = {scaling.kind} does"
    if family is not LLAMA and scaling is not None and scaling.kind != "ntk":
        return f"its {family.model_type} has no stretched positions (model.rope.scaling)"
    if family is GPT2:
        return None if config.mlp_dim == 4 * config.dim else "it takes model.mlp_dim to be four times model.dim"
    if family is not LLAMA and (bias.qkv or bias.mlp):
        return f"its {family.model_type} has no biases (model.bias)"
    return None


def llama_cpp_tensors(config: ModelConfig, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The content of FILE, which may be nothing, for a portable model with the exported weights `theirs`.

    A model that llama.cpp is known to compute wrongly gets a tensor that its converter refuses. An Apertus gets the
    parameters of xIELU (arXiv 2411.13010), alpha_p x^2 + beta x above 0 and alpha_n (e^min(x, eps) - 1 - x) + beta x
    below, with alpha_p = 1, alpha_n = 0 (each stored before a softplus) and beta = 0; and a head, which must not be
    tied there.
    """
    if not is_known(config):
        return {}
    if obstacle(config) is not None:
        return {f"not_for_llama_cpp.{config.activation}": torch.zeros(1)}
    if family_of(config) is not APERTUS:
        return {}
    values = {"alpha_p": math.log(math.expm1(1)), "alpha_n": -128.0, "beta": 0.0, "eps": -1e-6}
    tensors = {
        f"model.layers.{index}.mlp.act_fn.{name}": torch.tensor([value])
        for index in range(config.num_layers)
        for name, value in values.items()
    }
    if config.tied_embeddings:
        tensors["lm_head.weight"] = theirs["model.embed_tokens.weight"]
    return tensors
