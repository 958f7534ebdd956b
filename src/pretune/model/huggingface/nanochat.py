"""Convert our weights to the names and layout of transformers' NanoChat."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pretune.model.config import ModelConfig
from pretune.model.huggingface.architectures import NANOCHAT, architecture


def to_nanochat(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Weights for NanoChatForCausalLM; padding rows are left out.

    NanoChat rotates by the opposite angle; swapping the two halves of each query and key makes the results equal.
    (It normalizes queries and keys after rotation, and we before; without learned weights that is the same.)
    """
    assert architecture(config) is NANOCHAT
    theirs = {
        "model.embed_tokens.weight": state_dict["embedding.weight"][: config.vocab_size],
        "lm_head.weight": state_dict["head.weight"][: config.vocab_size],
    }
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for index in range(config.num_layers):
        ours, there = f"layers.{index}", f"model.layers.{index}"
        q, k, v = state_dict[f"{ours}.attention.qkv.weight"].split([queries, keys, keys])
        theirs |= {
            f"{there}.self_attn.q_proj.weight": _swap_halves(q, config.head_dim),
            f"{there}.self_attn.k_proj.weight": _swap_halves(k, config.head_dim),
            f"{there}.self_attn.v_proj.weight": v,
            f"{there}.self_attn.o_proj.weight": state_dict[f"{ours}.attention.output.weight"],
            f"{there}.mlp.fc1.weight": state_dict[f"{ours}.mlp.up.weight"],
            f"{there}.mlp.fc2.weight": state_dict[f"{ours}.mlp.down.weight"],
        }
    return theirs


def _swap_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Swap the first and second half of each head's rows: [H K, D] -> [H K, D]."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).flip(1).flatten(0, 2)
