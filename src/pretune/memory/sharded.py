"""The memory of a process where several share out weights, gradients and optimizer state (FSDP2)."""

from __future__ import annotations

from collections.abc import Mapping

from pretune.parallel.traffic import Sizes

_SHARED = ("weights", "averaged weights", "gradients", "optimizer")


def shared_out(parts: Mapping[str, int], sizes: Sizes, shards: int, reshard_after_forward: bool) -> dict[str, int]:
    """The parts of a Footprint for one of `shards` processes: its shares, and `gathered weights`: those outside the
    blocks and of two blocks, of which one computes and the other is fetched ahead (all of them without
    `reshard_after_forward`), with the gradients of what is outside and of one block before they are reduced."""
    found = {name: -(-size // shards) if name in _SHARED else size for name, size in parts.items()}
    blocks = min(2, sizes.num_blocks) if reshard_after_forward else sizes.num_blocks
    gathered = sizes.outside + blocks * sizes.blocks / max(sizes.num_blocks, 1)
    whole = sizes.trained_outside + sizes.trained_blocks / max(sizes.num_blocks, 1)
    return {"gathered weights": int(gathered + whole), **found}
