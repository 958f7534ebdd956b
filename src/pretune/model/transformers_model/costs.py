"""What a model of transformers costs: its parameters by part, and what each token is multiplied with.

T tokens per row. A mixture of experts multiplies a token with the experts that it is sent to, not with all. The scan of
a recurrent layer and convolutions are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from pretune.model.transformers_model.config import TransformersConfig
from pretune.model.transformers_model.model import TransformersModel

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_PARTS = {"attention": ("attn", "attention"), "experts": ("experts",), "mixer": ("mixer", "mamba", "ssm", "conv")}
"""Parts of a model by words in the names of their parameters; what has none of them is mlp."""
_CHOSEN = ("num_experts_per_tok", "moe_top_k", "moe_k", "top_k_experts")


def matrices(model: TransformersModel) -> Iterator[tuple[Tensor, float]]:
    """The matrices that tokens are multiplied with, each with the share of it that one token is multiplied with."""
    library = model.section.library
    experts, chosen = (next((v for n in names if (v := getattr(library, n, None))), 1) for names in (_EXPERTS, _CHOSEN))
    for name, parameter in model.layers.named_parameters():
        if parameter.ndim == 3 and len(parameter) == experts > 1:
            yield parameter, chosen / experts
        elif parameter.ndim == 2 and name.endswith("weight"):
            yield parameter, 1.0
    yield model.head.weight, 1.0


def attention_width(config: TransformersConfig, sequence_length: int) -> int:
    """The width of all heads times the number of attended tokens, summed over the layers that attend."""
    library = config.library
    kinds = getattr(library, "layer_types", None) or ["full_attention"] * config.num_layers
    window = getattr(library, "sliding_window", None) or sequence_length
    attended = {"full_attention": sequence_length, "sliding_attention": min(window, sequence_length)}
    return config.num_heads * config.head_dim * sum(attended.get(kind, 0) for kind in kinds)


def parameters_by_part(model: TransformersModel) -> dict[str, int]:
    """Parameters in embedding, attention, experts, mixer (of recurrent layers), mlp, head, and norms and scalars; tied
    ones as embedding."""
    roles: dict[nn.Parameter, str] = dict.fromkeys(model.head.parameters(), "head")
    roles |= dict.fromkeys(model.embedded.parameters(), "embedding")
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        inside = next((part for part, words in _PARTS.items() if any(word in name for word in words)), "mlp")
        part = roles.get(parameter, inside) if parameter.ndim > 1 else "norms and scalars"
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts
