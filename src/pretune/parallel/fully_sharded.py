"""Fully sharded data parallelism (FSDP2): every process keeps a share of each weight, and of its gradient and its
optimizer state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from pretune.core.config import ConfigError
from pretune.parallel.config import ParallelConfig
from pretune.parallel.processes import Processes


def device_mesh(section: ParallelConfig, processes: Processes, device: torch.device) -> DeviceMesh:
    """The processes in the arrangement of parallel.mesh; ConfigError if it is for another number of them."""
    if section.mesh is None:
        return init_device_mesh(device.type, (processes.count,), mesh_dim_names=("shard",))
    replicas, shards = section.mesh
    if replicas * shards != processes.count:
        found = [(n, processes.count // n) for n in range(1, processes.count + 1) if processes.count % n == 0]
        nearest = min(found, key=lambda one: abs(one[1] - shards))
        raise ConfigError(
            f"parallel.mesh = [{replicas}, {shards}] is for {replicas * shards} processes, and {processes.count} were "
            f"started: set parallel.mesh=[{nearest[0]},{nearest[1]}], or null"
        )
    return init_device_mesh(device.type, (replicas, shards), mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, blocks: Iterable[nn.Module], section: ParallelConfig, mesh: DeviceMesh) -> None:
    """Share out the parameters of `model`, which become DTensors, over `mesh`: those of each block together, and all
    others together, which include the embedding and the head.

    The weights of a block are gathered for its passes. The others stay gathered from the model's forward pass to the
    end of its backward pass, so that a loss can read the head's weights beside it. Build the optimizer afterwards.
    """
    dtype = torch.bfloat16 if section.param_dtype == "bfloat16" else None
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=section.reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    assert isinstance(model, FSDPModule)
    # torch finds out at the first pass which modules belong together: it must be a pass of the whole model.
    training = model.training
    model.eval()
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.int64, device=mesh.device_type), None)
    model.train(training)
    for part in _parts(model):
        part.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters of `model` are shared out."""
    return isinstance(model, FSDPModule)


@contextlib.contextmanager
def whole(section: ParallelConfig, *models: nn.Module) -> Iterator[None]:
    """A block in which each process has all weights of `models`, as plain tensors, and can compute with them by itself;
    they must not be changed. Does nothing to models that are not shared out. `section`: as in `shard`."""
    roots = [model for model in dict.fromkeys(models) if isinstance(model, FSDPModule)]
    blocks = [part for root in roots for part in _parts(root) if part is not root]
    try:
        for block in blocks:
            block.set_reshard_after_forward(False, recurse=False)
        for part in (*roots, *blocks):
            part.unshard()
        yield
    finally:
        for block in blocks:
            block.set_reshard_after_forward(section.reshard_after_forward, recurse=False)
        for part in (*roots, *blocks):
            part.reshard()


def _parts(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
