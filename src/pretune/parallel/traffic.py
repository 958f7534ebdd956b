"""What a device sends in a step: bytes and collectives, from the sizes of a model's parts and the number of devices.

A ring all-reduce of B bytes sends 2 (n - 1) / n B from each of n devices; an all-gather or a reduce-scatter, half of
it (Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002). FSDP gathers weights twice and reduces gradients once in
every micro-batch: 1.5 times the traffic of an all-reduce (ZeRO, arXiv:1910.02054, section 7).
"""

from __future__ import annotations

from dataclasses import dataclass

BUCKET = 25 * 2**20
"""Bytes of gradients that DistributedDataParallel reduces at once, by default."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parts, as they are sent.

    outside, blocks: weights outside its blocks, and in all of them. trained_outside, trained_blocks: gradients of the
    same. matrices: results of Muon's matrix products, 0 for other optimizers.
    """

    outside: float
    blocks: float
    num_blocks: int
    trained_outside: float
    trained_blocks: float
    matrices: float

    @property
    def trained(self) -> float:
        return self.trained_outside + self.trained_blocks


@dataclass(frozen=True)
class Sent:
    """Bytes that each device sends, and in how many collectives of how many devices."""

    moved: float
    collectives: int
    devices: int


@dataclass(frozen=True)
class Traffic:
    """What each device sends: in the forward and the backward pass of every micro-batch, in the backward pass of the
    last one besides, and after it, in the update. `exposed`: what no computation can hide, once in a step or, in
    `exposed_passes`, in every micro-batch."""

    forward: Sent
    backward: Sent
    last_backward: Sent
    update: Sent
    exposed_passes: Sent
    exposed: Sent

    def in_a_step(self, micro_batches: int) -> float:
        """Bytes that a device sends in a step."""
        passes = self.forward.moved + self.backward.moved + self.exposed_passes.moved
        return micro_batches * passes + self.last_backward.moved + self.update.moved + self.exposed.moved


def of_ddp(sizes: Sizes, devices: int) -> Traffic:
    """DistributedDataParallel: gradients are reduced, bucket by bucket, while the last backward pass goes on; the last
    bucket is reduced after it."""
    part = (devices - 1) / devices
    buckets = max(round(sizes.trained / BUCKET), 1)
    last = min(sizes.trained, BUCKET)
    return Traffic(
        forward=_nothing(devices),
        backward=_nothing(devices),
        last_backward=Sent(2 * part * (sizes.trained - last), buckets - 1, devices),
        update=Sent(part * sizes.matrices, min(1, round(sizes.matrices)), devices),
        exposed_passes=_nothing(devices),
        exposed=Sent(2 * part * last, 1, devices),
    )


def of_fsdp(sizes: Sizes, shards: int, replicas: int, reshard_after_forward: bool) -> Traffic:
    """FSDP2: the weights of each block are gathered ahead of its passes, and its gradients reduced after them. What is
    outside the blocks is gathered before the first, and reduced after the last. Between replicas, the reduced gradients
    are added up in the last micro-batch."""
    part, among = (shards - 1) / shards, (replicas - 1) / replicas
    again = sizes.blocks if reshard_after_forward else 0.0
    return Traffic(
        forward=Sent(part * sizes.blocks, sizes.num_blocks, shards),
        backward=Sent(part * (again + sizes.trained_blocks), sizes.num_blocks * (1 + reshard_after_forward), shards),
        last_backward=Sent(2 * among * sizes.trained / shards, (sizes.num_blocks + 1) * (replicas > 1), replicas),
        update=Sent(2 * part * sizes.matrices / shards, 2 * min(1, round(sizes.matrices)), shards),
        exposed_passes=Sent(part * (sizes.outside + sizes.trained_outside), 2, shards),
        exposed=_nothing(shards),
    )


def _nothing(devices: int) -> Sent:
    return Sent(0.0, 0, devices)
