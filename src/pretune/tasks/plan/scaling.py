"""How a run's step scales over devices: memory, traffic, time and efficiency of 1 to 1,024 of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pretune.compute.interconnects import LINKS, Link
from pretune.core.config import ConfigError
from pretune.memory.estimate import Footprint
from pretune.memory.sharded import shared_out
from pretune.optim.config import MuonConfig
from pretune.optim.groups import trained_parameters
from pretune.parallel.traffic import Sent, Sizes, Traffic, of_ddp, of_fsdp
from pretune.run.config import RunConfig
from pretune.run.model import adapted_model
from pretune.run.sharding import shared_parameters_are_plain

MOST = 1024
"""Devices up to which the table goes."""
FORWARD, BACKWARD = 1 / 3, 2 / 3
"""Shares of a micro-batch's time in its two passes."""


@dataclass(frozen=True)
class Scaled:
    """The same step on so many devices. Times in seconds, sizes in bytes; `sent` by each device in a step. `waits`:
    what computation does not hide of the time that the traffic takes. None for `memory` where not even one sequence
    fits."""

    devices: int
    kind: str
    micro_batch: int
    memory: int | None
    sent: float
    waits: float
    step: float
    tokens_per_second: float
    efficiency: float
    """Of the tokens/s of one device times their number."""


@dataclass(frozen=True)
class Scaling:
    """A run on the planned number of devices, with its memory by part, and on others beside it."""

    link: str
    source: str
    planned: Scaled
    memory: dict[str, int]
    others: list[Scaled]


class Devices:
    """Predicts steps of a run. speed: tokens/s of one device. memory: bytes that it has for tensors."""

    def __init__(self, config: RunConfig, footprint: Footprint, speed: float, memory: int) -> None:
        self.config, self.footprint, self.speed, self.memory = config, footprint, speed, memory
        self.link, self.sizes = LINKS[config.plan.interconnect], sizes_of(config)
        self.rows = config.batch.tokens // config.data.sequence_length

    def scaled(self, devices: int) -> tuple[Scaled, dict[str, int]]:
        """The step on so many devices, which divide its sequences, and the memory of each of them by part."""
        kind = self._kind(devices)
        micro_batch, rows = self._micro_batch(devices, kind), self.rows // devices
        parts = self._memory(devices, kind, micro_batch)
        length, micro_batches = self.config.data.sequence_length, rows // micro_batch
        passes, traffic = micro_batch * length / self.speed, self._traffic(devices, kind)
        waits = waiting(traffic, self.link, passes, micro_batches)
        step = micro_batches * passes + waits
        fits, tokens = sum(parts.values()) <= self.memory, self.config.batch.tokens
        found = Scaled(
            devices, kind, micro_batch, sum(parts.values()) if fits else None, traffic.in_a_step(micro_batches), waits,
            step, tokens / step, tokens / step / self.speed / devices,
        )  # fmt: skip
        return found, parts

    def _kind(self, devices: int) -> str:
        kind = self.config.parallel.kind
        if devices == 1:
            return "single"
        if kind != "auto":
            return "fsdp" if kind == "fsdp" else "ddp"
        sharded = self.config.parallel.model_copy(update={"kind": "fsdp"})
        refused = [*shared_parameters_are_plain(self.config.model_copy(update={"parallel": sharded}))]
        return "ddp" if refused or self.footprint.peak(1) <= self.memory else "fsdp"

    def _arrangement(self, devices: int) -> tuple[int, int]:
        """Replicas and shards: for other numbers of devices, groups of the same size."""
        mesh = self.config.parallel.mesh
        if mesh is None or devices % mesh[1] or devices < mesh[1]:
            return 1, devices
        return devices // mesh[1], mesh[1]

    def _traffic(self, devices: int, kind: str) -> Traffic:
        if kind != "fsdp":
            return of_ddp(self.sizes, devices)
        replicas, shards = self._arrangement(devices)
        section = self.config.parallel
        half = 0.5 if section.param_dtype == "bfloat16" else 1.0
        gathered = Sizes(
            half * self.sizes.outside, half * self.sizes.blocks, self.sizes.num_blocks, self.sizes.trained_outside,
            self.sizes.trained_blocks, self.sizes.matrices,
        )  # fmt: skip
        return of_fsdp(gathered, shards, replicas, section.reshard_after_forward)

    def _memory(self, devices: int, kind: str, micro_batch: int) -> dict[str, int]:
        """Of each device, by part."""
        parts = self.footprint.parts(micro_batch)
        if kind != "fsdp":
            return parts
        shards = self._arrangement(devices)[1]
        return shared_out(parts, self.sizes, shards, self.config.parallel.reshard_after_forward)

    def _micro_batch(self, devices: int, kind: str) -> int:
        """The configured micro-batch, or the largest that fits, where it divides a device's sequences; else the next
        smaller one that does. Few different ones, each of which takes seconds: as many as fit one device, or all."""
        rows, asked = self.rows // devices, self.config.batch.micro_batch
        if asked == "auto":
            # What sharing out saves does not depend on the micro-batch.
            saved = sum(self.footprint.parts(1).values()) - sum(self._memory(devices, kind, 1).values())
            asked = self.footprint.largest(self.memory + saved, self.rows) or 1
        return next(size for size in range(min(asked, rows), 0, -1) if rows % size == 0)


def make_scaling(config: RunConfig, footprint: Footprint, speed: float, memory: int) -> Scaling | None:
    """How the run scales over plan.devices; None for one. Raises ConfigError where they cannot share out a step."""
    planned = config.plan.devices
    if planned == 1:
        return None
    devices = Devices(config, footprint, speed, memory)
    if devices.rows % planned:
        fitting = [count for count in range(1, devices.rows + 1) if devices.rows % count == 0]
        nearest = min(fitting, key=lambda count: abs(count - planned))
        raise ConfigError(
            f"batch.tokens is {devices.rows:,} sequences, which {planned:,} devices (plan.devices) cannot share out "
            f"equally: set plan.devices={nearest}, or another batch.tokens"
        )
    found, parts = devices.scaled(planned)
    counts = sorted({count for count in (1, *(2**power for power in range(1, 11))) if count <= MOST} | {planned})
    others = [devices.scaled(count)[0] for count in counts if devices.rows % count == 0]
    return Scaling(config.plan.interconnect, devices.link.source, found, parts, others)


def sizes_of(config: RunConfig) -> Sizes:
    """Bytes of the parts of a run's model, weights and gradients in float32."""
    model = adapted_model(config, torch.device("meta"))
    inside = {parameter for block in model.layers for parameter in block.parameters()}
    weights = [(one.numel() * 4, one.requires_grad, one in inside) for one in model.parameters()]
    matrices = 0
    if isinstance(config.optimizer, MuonConfig):
        itemsize = 4 if config.precision.activations == "float32" else 2
        matrices = sum(one.parameter.numel() for one in trained_parameters(model) if one.role == "hidden") * itemsize
    return Sizes(
        outside=sum(size for size, _, is_inside in weights if not is_inside),
        blocks=sum(size for size, _, is_inside in weights if is_inside),
        num_blocks=len(model.layers),
        trained_outside=sum(size for size, trained, is_inside in weights if trained and not is_inside),
        trained_blocks=sum(size for size, trained, is_inside in weights if trained and is_inside),
        matrices=matrices,
    )


def waiting(traffic: Traffic, link: Link, passes: float, micro_batches: int) -> float:
    """Seconds of a step in which devices only wait for traffic. `passes`: those of a micro-batch."""

    def seconds(sent: Sent) -> float:
        return link.seconds(sent.moved, sent.collectives, sent.devices)

    forward, backward = seconds(traffic.forward), seconds(traffic.backward)
    hidden = max(0.0, forward - FORWARD * passes) + max(0.0, backward - BACKWARD * passes)
    # What is left of the last backward pass's computation hides what is reduced only then.
    left = max(0.0, BACKWARD * passes - backward)
    last = max(0.0, seconds(traffic.last_backward) - left)
    once = last + seconds(traffic.update) + seconds(traffic.exposed)
    return micro_batches * (hidden + seconds(traffic.exposed_passes)) + once
