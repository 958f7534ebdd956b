"""Processes that share out Muon's matrices: each step is that of one process which has all of them."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from optimizer_sections import muon, normuon
from tiny import tiny_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pretune.core.named_tensors import shared_out, whole_tensors
from pretune.optim.config import OptimizerConfig
from pretune.optim.optimizers import build_optimizer
from pretune.optim.shared_matrices import Piece

PROCESSES = 3
CONFIGS = (muon(), normuon())


def model() -> nn.Module:
    """Queries, keys and values are fused, of different heights, and no height is a multiple of the processes."""
    return tiny_model(num_kv_heads=2, activation="swiglu")


def moved(one: nn.Module, config: OptimizerConfig, dtype: torch.dtype, shared: bool) -> dict[str, Tensor]:
    """The weights after a few steps with gradients that depend on the step alone."""
    optimizer = build_optimizer(config, one, dtype=dtype, shared=shared)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        for parameter in one.parameters():
            parameter.grad = shared_out(torch.randn(parameter.shape, generator=generator), parameter)
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in whole_tensors(dict(one.named_parameters())).items()}


def work(rank: int, store: str, found: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    results = {}
    for index, config in enumerate(CONFIGS):
        for dtype in (torch.float32, torch.bfloat16):
            results["whole", index, dtype] = moved(model(), config, dtype, True)
            for name, mesh in (("rows", (3,)), ("replicated", (3, 1))):
                one = model()
                names = ("shard",) if name == "rows" else ("replicate", "shard")
                arranged = init_device_mesh("cpu", mesh, mesh_dim_names=names)
                for layer in one.get_submodule("layers").children():
                    fully_shard(layer, mesh=arranged)
                fully_shard(one, mesh=arranged)
                results[name, index, dtype] = moved(one, config, dtype, True)
    torch.save(results, f"{found}-{rank}")
    dist.destroy_process_group()


def test_a_step_is_that_of_one_process(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    given_to = (str(tmp_path / "store"), str(tmp_path / "found"))
    processes = [context.Process(target=work, args=(rank, *given_to)) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    ranks = [torch.load(tmp_path / f"found-{rank}") for rank in range(PROCESSES)]
    for index, config in enumerate(CONFIGS):
        for dtype in (torch.float32, torch.bfloat16):
            alone = moved(model(), config, dtype, False)
            for way in ("whole", "rows", "replicated"):
                first = ranks[0][way, index, dtype]
                assert first.keys() == alone.keys()
                for name, tensor in first.items():
                    assert all(torch.equal(tensor, other[way, index, dtype][name]) for other in ranks), "all agree"
                    # In bfloat16, matrices in another batch are rounded otherwise.
                    limit = 1e-6 if dtype == torch.float32 else 3e-4
                    torch.testing.assert_close(tensor, alone[name], rtol=0, atol=limit, msg=f"{way} {name}")


@given(
    heights=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    count=st.integers(1, 6),
)
def test_rows_of_a_piece_are_those_of_torchs_shards(heights: list[int], count: int) -> None:
    """Every row of a parameter is in one piece, and with the process that torch gives it to."""
    height = sum(heights)
    pieces = [Piece(sum(heights[:at]), rows, 1, height) for at, rows in enumerate(heights)]
    for rank in range(count):
        rows = [row for piece in pieces for row in range(*piece.of(rank, count))]
        shards = torch.arange(height).chunk(count)
        assert rows == (shards[rank].tolist() if rank < len(shards) else [])
