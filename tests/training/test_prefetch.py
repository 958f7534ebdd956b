"""Batches equal the loader's, whatever was prefetched; and nothing waits for the device between two reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretune.core.batch import IGNORE, Batch
from pretune.dispatch import run
from pretune.tasks.train.running import Instruments, Run
from pretune.training.prefetch import Prefetcher

Compose = Callable[..., dict[str, Any]]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def read(position: int, num_sequences: int) -> Batch:
    inputs = torch.arange(position, position + num_sequences)[:, None].expand(-1, 8).contiguous()
    targets = inputs.masked_fill(torch.arange(8) < position % 8, IGNORE)
    return Batch(inputs, targets, inputs.int() if position % 2 else None)


@pytest.mark.parametrize("device", DEVICES)
def test_every_batch_is_the_one_that_was_asked_for(device: str) -> None:
    feed = Prefetcher(read, Batch.num_scored, torch.device(device))
    # Forward, with other numbers of sequences, backward, and the same again.
    for position, rows in [(0, 4), (4, 4), (8, 2), (10, 6), (3, 6), (9, 1), (9, 1)]:
        fed, expected = feed.batch(position, rows), read(position, rows)
        assert fed.scored == fed.scored_tokens == expected.num_scored()
        assert fed.batch.inputs.device.type == device
        assert fed.batch.inputs.tolist() == expected.inputs.tolist()
        assert fed.batch.targets.tolist() == expected.targets.tolist()
        assert (fed.batch.document_ids is None) == (expected.document_ids is None)


class Waits(TorchDispatchMode):
    """Counts operations that make the host wait for a GPU: reading tensor values, and shapes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1:])
        )
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion"])
def test_a_step_that_reports_nothing_waits_for_nothing(tiny: Compose, optimizer: str) -> None:
    counts = {}
    for steps in (1, 2, 5):  # the first prepares the data
        settings = [f"optimizer={optimizer}", f"budget.steps={steps}", "log_every=100", f"name=steps{steps}"]
        quiet = ["checkpoint.every=null", "evaluation.every=null", "samples.prompts=[]", "resume=never"]
        with Waits() as waits:
            assert run(tiny(*settings, *quiet, "device=cpu", "data.packing.isolate=true", "precision=bf16",
                            "precision.compile=false")) == 0  # fmt: skip
        counts[steps] = waits.counts
    # Scored tokens, by which the loss is divided, and all tokens are counted on the host, before the batch is copied.
    # The gradients' norm is read only on the CPU, three times; on a GPU the test below would fail.
    assert counts[5] - counts[2] == Counter({"_local_scalar_dense": (2 + 3) * 3})


@pytest.mark.gpu
def test_on_a_gpu_neither(tiny: Compose) -> None:
    def watch(training: Run, _: object) -> None:
        # The first step is looked at for what it brings, every third is reported.
        state = training.state
        waits = state.step == 0 or state.step % 3 == 2 or state.finished
        torch.cuda.set_sync_debug_mode("default" if waits else "error")
        modes.append(torch.cuda.get_sync_debug_mode())

    modes: list[int] = []
    settings = ["budget.steps=6", "log_every=3", "evaluation.every=null", "checkpoint.every=null"]
    mapping = tiny("device=cuda", "precision=bf16", *settings, "samples.prompts=[]")
    try:
        assert run(mapping, Instruments(on_begin=watch)) == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert modes.count(2) == 3  # steps 2, 4 and 5
