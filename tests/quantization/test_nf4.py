"""4-bit weights: their values, computing with them, and the memory they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn
from torchao.quantization import NF4Tensor

from pretune.core.config import ConfigError
from pretune.quantization.config import NoQuantizationConfig, QloraConfig
from pretune.quantization.nf4 import NF4Linear, dequantize, frozen_layers, quantize, stored_bytes

QLORA = QloraConfig(kind="qlora_nf4", block_size=64)


def frozen(**changes: Any) -> Any:
    model = tiny_model(**changes)
    return model.requires_grad_(False)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight for name, layer in frozen_layers(model).items()}


@pytest.mark.parametrize(("shape", "block"), [((128, 256), 64), ((8, 8), 32), ((96, 80), 16)])
def test_the_numbers_are_torchaos_and_as_near_as_4_bits_can_be(shape: tuple[int, int], block: int) -> None:
    layer = nn.Sequential()
    layer.add_module("layers", nn.Sequential(nn.Linear(shape[1], shape[0])))
    layer.requires_grad_(False)
    before = layer.get_parameter("layers.0.weight").clone()
    quantize(layer, QloraConfig(kind="qlora_nf4", block_size=block))
    quantized: Any = layer.get_submodule("layers.0")
    assert isinstance(quantized, NF4Linear)
    assert isinstance(quantized.weight, NF4Tensor)
    weight = quantized.expand(quantized.stored(), None)
    torch.testing.assert_close(weight, quantized.weight.get_original_weight(), rtol=1e-6, atol=1e-7)
    # The widest gap between two levels is 0.30 of a block's largest number, and scales are rounded to 8 bits.
    largest = before.flatten().view(-1, block).abs().amax(1).repeat_interleave(block).view(shape)
    assert ((weight - before).abs() <= 0.17 * largest + 0.01 * largest.max()).all()
    x = torch.randn(3, shape[1])
    torch.testing.assert_close(quantized(x), nn.functional.linear(x, weight, quantized.bias), rtol=1e-5, atol=1e-5)
    dequantize(layer)
    assert type(quantized) is nn.Linear
    assert torch.equal(quantized.weight, weight)


def test_none_changes_nothing_and_only_frozen_layers_inside_blocks_are_stored() -> None:
    model = frozen(tied_embeddings=False)
    quantize(model, NoQuantizationConfig(kind="none"))
    assert not any(isinstance(module, NF4Linear) for module in model.modules())
    model.get_submodule("layers.1.mlp.down").requires_grad_(True)
    quantize(model, QLORA)
    stored = {name for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    assert len(stored) == 7
    assert "layers.1.mlp.down" not in stored
    assert "head" not in stored


@pytest.mark.parametrize("bias", [False, True])
def test_inputs_get_the_gradient_of_what_the_bits_stand_for(bias: bool) -> None:
    biases = {"qkv": bias, "attention_output": bias, "mlp": bias}
    model = frozen(bias=biases)
    quantize(model, QLORA)
    reference = frozen(bias=biases)
    quantize(reference, QLORA)
    dequantize(reference)
    gradients = []
    for one in (model, reference):
        one.embedding.weight.requires_grad_(True)
        one(torch.arange(20)[None]).square().sum().backward()
        gradients.append(one.embedding.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def saved(loss: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if type(tensor) is Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    return sum(kept.values())


def test_it_takes_the_bytes_that_it_says() -> None:
    layer = nn.Sequential()
    layer.add_module("layers", nn.Sequential(nn.Linear(512, 256, bias=False)))
    quantize(layer.requires_grad_(False), QLORA)
    quantized: Any = layer.get_submodule("layers.0")
    stored = sum(tensor.untyped_storage().nbytes() for tensor in quantized.stored())
    assert stored == stored_bytes(512 * 256, 64)
    assert 8 * stored / (512 * 256) == pytest.approx(4.13, abs=0.01)
    x = torch.randn(4, 512, requires_grad=True)
    assert saved(lambda: quantized(x).sum()) <= stored


def test_zeros_stay_zeros() -> None:
    model = frozen()
    with torch.no_grad():
        model.get_submodule("layers.0.mlp.down").weight.zero_()
    quantize(model, QLORA)
    dequantize(model)
    assert not model.get_submodule("layers.0.mlp.down").weight.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(3, 32), False)),
            r"mlp\.down .*block_size=64",
        ),
        (lambda layer: layer.weight[0].fill_(float("nan")), r"layers\.0\.mlp\.down .*not finite"),
    ],
)
def test_what_cannot_be_stored_is_named(change: Callable[[Any], None], message: str) -> None:
    model = frozen()
    with torch.no_grad():
        change(model.get_submodule("layers.0.mlp.down"))
    with pytest.raises(ConfigError, match=message):
        quantize(model, QLORA)
