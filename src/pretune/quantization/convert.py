"""Convert a trained model's weights to integers, as torchao tensors that exports can handle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pretune.core.quiet import muted_logs
from pretune.quantization.config import FakeQuantizationConfig
from pretune.quantization.rounding import Grid, grids, rounds_activations, scales

_ACTIVATIONS: Any = "int8_asym_per_token"


def convert(model: nn.Module, config: FakeQuantizationConfig) -> None:
    """Store the linear layers and tables of a plain model as integers, in place, for inference.

    Their weights become torchao's IntxUnpackedToInt8Tensor: `qdata` [E, D] int8, `scale` and `zero_point` [E, G], and
    `activation_quantization` if the layer's inputs are quantized too. A tied head becomes a separate layer `model.head`
    that shares the memory of the table's integers and scales, and rounds its inputs like other layers. `model` must
    hold trained float weights, with its adapter merged (run.model.converted_model).
    """
    active = rounds_activations(config)
    for name, grid in grids(model, config).items():
        layer = model.get_submodule(name)
        assert type(layer) in (nn.Linear, nn.Embedding), f"{name} is not a plain layer: convert a freshly loaded model"
        weight = _integers(layer.weight, grid, active and isinstance(layer, nn.Linear))
        layer.weight = nn.Parameter(weight, requires_grad=False)
    _give_head(model, active)


def _integers(weight: Any, grid: Grid, active: bool) -> Tensor:
    scale, weight = scales(weight, grid), weight.detach()
    return _tensor_class().from_hp(
        weight,
        (1, grid.group_size or weight.shape[1]),  # pyright: ignore[reportArgumentType]  # declared tuple[int]
        getattr(torch, f"int{grid.bits}"),
        activation_quantization=_ACTIVATIONS if active else None,
        intx_choose_qparams_algorithm=None,
        custom_scale=scale.to(weight.dtype),
        custom_zero_point=torch.zeros_like(scale, dtype=torch.int8),
    )


def _give_head(model: nn.Module, active: bool) -> None:
    """Give a model with a tied head a separate head layer, if the embedding table is stored as integers."""
    table: Any = model.get_submodule("embedding").weight
    if getattr(model, "head", None) is not None or not isinstance(table, _tensor_class()):
        return
    integers = table.qdata, table.scale, table.zero_point, table.target_dtype, table.block_size, table.dtype
    weight = _tensor_class()(*integers, _ACTIVATIONS if active else None)
    head = nn.Linear(1, 1, bias=False, device="meta")
    head.out_features, head.in_features = table.shape
    head.weight = nn.Parameter(weight, requires_grad=False)
    model.head = head


def _tensor_class() -> Any:
    with muted_logs():
        from torchao.quantization import IntxUnpackedToInt8Tensor
    return IntxUnpackedToInt8Tensor
