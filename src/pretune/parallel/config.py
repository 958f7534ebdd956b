"""Configuration of training in several processes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pretune.core.config import Seconds, Section


class ParallelConfig(Section):
    kind: Literal["auto", "single", "ddp", "fsdp"]
    """How training is spread over the processes that torchrun or srun started. ddp: each process has the whole model
    and computes the gradients of its share of every batch (DistributedDataParallel); fsdp: each also keeps only its
    share of weights, gradients and optimizer state, and gathers the weights of a block when it needs them (FSDP2);
    single: one process; auto: where there are several processes, ddp if weights, gradients and optimizer state fit
    into one device, else fsdp; where there is one, single."""
    timeout: Seconds
    """Longest time that a process waits for the others, in seconds or as text (30m), before it ends with an error."""
    mesh: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None
    """fsdp: [replicas, shards], whose product is the number of processes. Each group of `shards` processes that follow
    one another shares one copy of the model, and only gradients pass between groups (HSDP): best with the GPUs of a
    machine in one group. null: one copy, shared by all."""
    reshard_after_forward: bool
    """fsdp: free the gathered weights of a block after its forward pass, and gather them again for the backward pass;
    false takes more memory, and a third less communication."""
    param_dtype: Literal["float32", "bfloat16"]
    """fsdp: the dtype in which weights are gathered and computed with; gradients are added up in float32. bfloat16
    halves the communication, but also rounds the weights of norms and embeddings, so losses differ slightly from those
    of one process."""
