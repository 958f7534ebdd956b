"""Find the biggest model of a run's family that a device can train, fine-tune or serve.

Models of the family have the run's proportions (width to depth, heads, feed-forward width), vocabulary, sequence length
and optimizer; only the size differs. Training uses micro-batches of one sequence without compilation, which needs the
least memory, and the run's setting for activation checkpointing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from pretune.adapters.config import NoAdapterConfig
from pretune.compute import hardware
from pretune.compute.devices import Device
from pretune.memory.estimate import Footprint
from pretune.model.config import GATED, ModelConfig
from pretune.model.costs import (
    cache_bytes_per_token,
    forward_flops_of,
    inference_bytes,
    matrix_parameters,
    parameters_by_part,
    skeleton,
    training_flops_of,
)
from pretune.quantization.config import NoQuantizationConfig
from pretune.run.config import RunConfig
from pretune.run.teacher import teacher_flops

Way = Literal["pretraining", "full fine-tuning", "LoRA", "QLoRA", "inference"]
WAYS: tuple[Way, ...] = ("pretraining", "full fine-tuning", "LoRA", "QLoRA", "inference")

LARGEST = 256
"""Largest size considered, in steps of width."""
NF4_BYTES = (4 + 8 / 64 + 32 / 64 / 256) / 8
"""Bytes per weight: 4 bits, an 8-bit scale per 64 weights, a float32 per 256 scales (arXiv:2305.14314)."""
ADAPTER_BYTES = 4 + 4 + 8
"""Bytes per trained adapter weight: float32, its gradient and AdamW's two moments."""


@dataclass(frozen=True)
class Biggest:
    """way; the model and its parameters, None if not even the smallest fits; memory (bytes) and time it needs; limit:
    what the next larger model runs out of."""

    way: Way
    model: ModelConfig | None
    parameters: int
    memory: int
    seconds: float | None
    """Time of fine-tuning, or of pretraining to the compute-optimal number of tokens; None for inference."""
    tokens_per_second: float
    limit: str


@dataclass(frozen=True)
class Member:
    """A model of the family, and its parameters: all, those of the matrices inside layers, those that every token is
    multiplied with, and those of its adapters."""

    shape: ModelConfig
    parameters: int
    inside: int
    matrices: int
    adapter: int


class Family:
    """Models with the proportions of `config`, and what each needs on `device`, with a time limit of `seconds`."""

    def __init__(self, config: RunConfig, device: Device, kind: str, seconds: float) -> None:
        self.config, self.device, self.seconds = config, device, seconds
        self.memory, self.teacher_flops = hardware.usable(device.memory, kind), teacher_flops(config)
        self._members: dict[int, Member] = {}
        full = {"adapter": NoAdapterConfig(kind="none"), "quantization": NoQuantizationConfig(kind="none")}
        config = config.model_copy(update=full)
        checkpointed = config.precision.activation_checkpointing
        footprint = _eager(config, checkpointed)
        whole = sum(parameters_by_part(skeleton(config.model)).values())
        self.teacher_bytes = footprint.reference if footprint.frozen.teacher else 0  # the same, whatever learns from it
        self.state_bytes = (footprint.constant - self.teacher_bytes) / whole
        self.kept_per_unit = _saved_per_unit(footprint)
        self.again_per_unit = _saved_per_unit(_eager(config, False)) if checkpointed else 0.0
        """Bytes for the one layer that is being recomputed."""

    def biggest(self, way: Way) -> Biggest:
        """The largest model that fits in memory and time, by bisection: if a size does not fit, no larger one does."""
        low, high = 0, LARGEST + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._measure(way, middle)[0] == "" else (low, middle)
        limit = self._measure(way, high)[0] if high <= LARGEST else "nothing looked at"
        if low == 0:
            return Biggest(way, None, 0, 0, None, 0.0, limit)
        return self._measure(way, low, limit)[1]

    def _measure(self, way: Way, size: int, limit: str = "") -> tuple[str, Biggest]:
        """What a size runs out of ("" if it fits), and what it needs."""
        if size not in self._members:  # the searches of all ways begin with the same sizes
            self._members[size] = member(self.shape(size), self.config.plan.adapter_rank)
        found = self._members[size]
        memory = int(self._memory(way, found))
        speed, seconds = self._speed(way, found)
        plan = self.config.plan
        lacking = "memory" if memory > self.memory else ""
        if seconds is not None and seconds > self.seconds:
            lacking = lacking or "time"
        if way == "inference" and speed < plan.tokens_per_second:
            lacking = lacking or "speed"
        return lacking, Biggest(way, found.shape, found.parameters, memory, seconds, speed, limit)

    def shape(self, size: int) -> ModelConfig:
        """The family's model with `size` groups of query heads."""
        base = self.config.model
        assert isinstance(base, ModelConfig), "the family of a model that transformers builds is not known"
        group = base.num_heads // base.num_kv_heads
        dim = size * max(round(base.dim * group / base.num_heads / 8) * 8, 8)
        mlp_dim = max(round(base.mlp_dim * dim / base.dim / 8) * 8, 8)
        num_layers = max(round(base.num_layers * dim / base.dim), 1)
        changes = {"dim": dim, "mlp_dim": mlp_dim, "num_layers": num_layers}
        return base.model_copy(update={**changes, "num_heads": group * size, "num_kv_heads": size})

    def _memory(self, way: Way, of: Member) -> float:
        shape, parameters, length = of.shape, of.parameters, self.config.data.sequence_length
        if way == "inference":
            return inference_bytes(shape, parameters, shape.max_sequence_length)
        activations = (self.kept_per_unit * shape.num_layers + self.again_per_unit) * shape.dim
        widest = shape.mlp_dim * (2 if shape.activation in GATED else 1)
        # The last layer's gradients, and four float32 copies of the logits (an eager softmax and its gradient).
        work = length * (4 * widest + 4 * shape.dim)
        logits = 16 * min(length, self.config.stage.objective.chunk_tokens) * shape.padded_vocab_size
        casts = 0 if self.config.precision.activations == "float32" else 2 * parameters
        head = 4 * shape.padded_vocab_size * shape.dim  # the head's gradient, computed in the forward pass and kept
        passes = activations + work + logits + self.teacher_bytes
        adapters = ADAPTER_BYTES * of.adapter
        match way:
            case "pretraining" | "full fine-tuning":
                return self.state_bytes * parameters + casts + head + passes
            case "LoRA":
                return 2 * parameters + adapters + passes
            case "QLoRA":
                return NF4_BYTES * of.inside + 2 * (parameters - of.inside) + adapters + passes

    def _speed(self, way: Way, of: Member) -> tuple[float, float | None]:
        """Tokens per second, and the total time in seconds."""
        plan, length = self.config.plan, self.config.data.sequence_length
        rate = plan.mfu * self.device.peak_flops
        if way == "inference":
            # Decoding one token reads every weight once, and the keys and values of half a context on average.
            context = of.shape.max_sequence_length // 2
            read = 2 * of.parameters + cache_bytes_per_token(of.shape, 2) * context
            return min(self.device.bandwidth / read, rate / forward_flops_of(of.matrices, of.shape, context)), None
        trained = 0 if way in ("LoRA", "QLoRA") else of.matrices  # frozen weights need no gradient
        flops = training_flops_of(of.matrices, trained, of.shape, length) + self.teacher_flops
        tokens = plan.tokens_per_parameter * of.parameters if way == "pretraining" else plan.finetune_tokens
        return rate / flops, tokens * flops / rate


def _eager(config: RunConfig, checkpointed: bool) -> Footprint:
    changes = {"compile": False, "activation_checkpointing": checkpointed}
    return Footprint(config.model_copy(update={"precision": config.precision.model_copy(update=changes)}))


def _saved_per_unit(footprint: Footprint) -> float:
    """Bytes saved per sequence and layer, and per unit of width: saved tensors are proportional to the width."""
    model = footprint.config.model
    return (footprint.saved(2) - footprint.saved(1)) / model.num_layers / model.dim


def member(shape: ModelConfig, rank: int) -> Member:
    """A member of the family, with adapters of `rank` on all of its layers' matrices.

    Counted on its shallowest relatives, since building hundreds of layers takes seconds: two more layers add what two
    more added (two, because value embeddings come with every other layer).
    """
    few = min(shape.num_layers, 2 + shape.num_layers % 2)
    first, second = (_counts(shape.model_copy(update={"num_layers": few + more}), rank) for more in (0, 2))
    pairs = (shape.num_layers - few) // 2
    parameters, inside, matrices, adapter = (a + pairs * (b - a) for a, b in zip(first, second, strict=True))
    return Member(shape, parameters, inside, matrices, adapter)


def _counts(shape: ModelConfig, rank: int) -> tuple[int, int, int, int]:
    model = skeleton(shape)
    linear: list[nn.Linear] = [module for module in model.layers.modules() if isinstance(module, nn.Linear)]
    return (
        sum(parameters_by_part(model).values()),
        sum(one.weight.numel() for one in linear),
        matrix_parameters(model)[0],
        sum(rank * (one.in_features + one.out_features) for one in linear),
    )


def search(config: RunConfig, device: Device, kind: str, seconds: float) -> list[Biggest]:
    """The biggest model for each way of using the device."""
    family = Family(config, device, kind, seconds)
    return [family.biggest(way) for way in WAYS]
