from __future__ import annotations

import pytest
import torch

from pretune.core.config import validate
from pretune.model.config import ModelConfig
from pretune.model.transformer import Transformer


@pytest.fixture
def tiny_model() -> Transformer:
    """A byte-level model, in evaluation mode."""
    section = {
        "architecture": None, "num_layers": 2, "dim": 32, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16,
        "mlp_dim": 64, "vocab_size": 257, "vocab_multiple_of": 1, "max_sequence_length": 256, "activation": "swiglu",
        "norm": {"kind": "rmsnorm", "eps": 1e-5, "learned": True, "offset": 0, "placement": "before"}, "qk_norm": False,
        "qk_norm_over": "head", "attention_softcap": None, "scale_embedding": False,
        "attention_scale": 1.0, "window": None, "value_embeddings": False, "residual_scalars": False,
        "learned_positions": False,
        "normalize_embedding": False,
        "bias": {"qkv": False, "attention_output": False, "mlp": False}, "tied_embeddings": True, "dropout": 0.0,
        "softcap": None,
        "init": {"std": 0.5, "embedding_std": 0.5, "head_std": 0.5, "output": "plain"},
        "rope": {"theta": 10000.0, "local_theta": None, "fraction": 1.0, "scaling": None, "pattern": "R"},
    }  # fmt: skip
    model = Transformer(validate(ModelConfig, section))
    model.reset_parameters(torch.Generator().manual_seed(1))
    return model.eval()
