"""batch.micro_batch: auto."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretune.core.batch import Batch
from pretune.core.config import ConfigError, InputError, validate
from pretune.dispatch import run
from pretune.memory.estimate import Footprint
from pretune.model.costs import training_flops
from pretune.model.transformer import Transformer
from pretune.parallel.data_parallel import SharedGradients
from pretune.run.config import RunConfig
from pretune.tasks.train.micro_batch import MicroBatch, accumulate, choose_micro_batch
from pretune.tasks.train.running import Instruments

Compose = Callable[..., dict[str, Any]]
CPU = torch.device("cpu")


def silent(text: str) -> None:
    raise AssertionError(f"there is nothing to say, but it said: {text}")


def never(rows: int) -> None:
    raise AssertionError("nothing is tried on a CPU, where memory that runs out kills the process")


@pytest.fixture
def auto(tiny: Compose) -> RunConfig:
    return validate(RunConfig, tiny("batch.micro_batch=auto"))  # 8 sequences of 32 tokens per step


def test_a_configured_micro_batch_is_taken(tiny: Compose, tmp_path: Path) -> None:
    config = validate(RunConfig, tiny("batch.micro_batch=2"))
    assert choose_micro_batch(config, CPU, tmp_path / "m.json", never, silent) == MicroBatch(2, "cpu", None)
    assert not (tmp_path / "m.json").exists()


def test_the_largest_that_fits_is_found_and_remembered(auto: RunConfig, tmp_path: Path) -> None:
    path, enough = tmp_path / "m.json", 2 * Footprint(auto).peak(4)
    assert choose_micro_batch(auto, CPU, path, never, silent, lambda device: enough).size == 4
    assert choose_micro_batch(auto, CPU, path, never, silent, lambda device: 1).size == 4, "remembered"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"size": 3, "device": "cpu"}', '{"size": 4, "device": "NVIDIA L4"}', '{"size": 0}']
)
def test_what_does_not_apply_is_not_remembered(auto: RunConfig, tmp_path: Path, content: str) -> None:
    path = tmp_path / "m.json"
    path.write_text(content)
    assert choose_micro_batch(auto, CPU, path, never, silent).size == 8


def test_a_model_too_large_for_one_row_is_one_error(auto: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"out of memory on cpu with micro-batches of 1 sequence; .* a smaller model"):
        choose_micro_batch(auto, CPU, tmp_path / "m.json", never, silent, lambda device: 1000)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.05 GiB, max allowed: 18.13 GiB)"),
]
"""As on CUDA, and on Apple's GPU."""


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_on_a_gpu_it_is_tried_and_halved(
    auto: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    # Meta tensors stand in for the GPU's.
    empty, cuda = torch.empty, torch.device("cuda")

    def without_gpu(*size: Any, device: Any = None, **more: Any) -> Tensor:
        return empty(*size, device="meta" if device == cuda else device, **more)

    monkeypatch.setattr(torch, "empty", without_gpu)
    tried: list[int] = []
    said: list[str] = []

    def trial(rows: int) -> None:
        tried.append(rows)
        if rows > 2:
            raise error

    found = choose_micro_batch(auto, cuda, tmp_path / "m.json", trial, said.append, lambda device: 2**40)
    assert (found.size, tried) == (2, [8, 4, 2])
    assert said == [
        "trying micro-batches of 8 sequences ...",
        "out of memory with micro-batches of 8 sequences; trying 4 ...",
        "out of memory with micro-batches of 4 sequences; trying 2 ...",
    ]
    assert json.loads((tmp_path / "m.json").read_text()) == {"size": 2, "device": "NVIDIA L4"}


class Scale(nn.Module):
    """A loss that needs memory for its sequences, with limited memory available."""

    def __init__(self, room: int, error: RuntimeError = OUT_OF_MEMORY[0]) -> None:
        super().__init__()
        self.weight, self.room, self.error = nn.Parameter(torch.tensor(2.0)), room, error

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        loss = (self.weight * batch.inputs).sum()
        if len(batch.inputs) > self.room:
            raise self.error
        return {"loss": loss, "size": loss.new_tensor(len(batch.inputs))}


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_step_survives_an_out_of_memory(tmp_path: Path, error: RuntimeError) -> None:
    tokens = torch.arange(24).view(12, 2)
    batch, model, path = Batch(tokens, tokens, None), Scale(3, error), tmp_path / "m.json"
    micro_batch, optimizer = MicroBatch(12, "cpu", path), torch.optim.SGD(model.parameters())
    # The gradient of an attempt that failed midway must not count twice.
    model.weight.grad = torch.tensor(1e6)
    said: list[str] = []
    sums = accumulate(SharedGradients(model, model), optimizer, batch, 24, micro_batch, said.append)
    loss = sums["loss"]
    assert sums["size"].item() == 12
    assert micro_batch.size == 3
    assert said == [
        "out of memory with micro-batches of 12 sequences; the step begins again with 6",
        "out of memory with micro-batches of 6 sequences; the step begins again with 3",
    ]
    assert json.loads(path.read_text())["size"] == 3
    assert loss.item() == 2 * tokens.sum()
    assert not loss.requires_grad
    torch.testing.assert_close(model.weight.grad, tokens.sum() / 24)


def test_any_other_error_is_not_about_memory() -> None:
    tokens = torch.arange(24).view(12, 2)
    model = Scale(3, RuntimeError("CUDA error: an illegal memory access was encountered"))
    optimizer, batch = torch.optim.SGD(model.parameters()), Batch(tokens, tokens, None)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        accumulate(SharedGradients(model, model), optimizer, batch, 24, MicroBatch(12, "cpu", Path("unused")), silent)


def test_a_fixed_micro_batch_that_does_not_fit_says_what_to_set() -> None:
    tokens = torch.arange(24).view(12, 2)
    model = Scale(room=3)
    optimizer, batch = torch.optim.SGD(model.parameters()), Batch(tokens, tokens, None)
    with pytest.raises(InputError, match=r"micro-batches of 12 sequences; set batch.micro_batch=6, or auto"):
        accumulate(SharedGradients(model, model), optimizer, batch, 24, MicroBatch(12, "cpu", None), silent)


def test_a_run_with_auto_trains_and_remembers(tiny: Compose) -> None:
    mapping = tiny("batch.micro_batch=auto", "budget.steps=2", "samples.prompts=[]")
    assert run(mapping, Instruments(peak_flops=lambda device, precisions: 1e12)) == 0
    folder = Path(mapping["output_dir"]) / mapping["name"]
    assert json.loads((folder / "micro_batch.json").read_text()) == {"size": 8, "device": "cpu"}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    flops = training_flops(Transformer(validate(RunConfig, mapping).model), 32)
    (row,) = [row for row in rows if "train/mfu" in row]
    assert row["train/mfu"] == pytest.approx(row["train/tokens_per_second"] * flops / 1e12)


def test_auto_still_needs_whole_rows(tiny: Compose) -> None:
    with pytest.raises(ConfigError, match=r"batch\.tokens"):
        validate(RunConfig, tiny("batch.micro_batch=auto", "batch.tokens=250"))
    with pytest.raises(ConfigError, match="micro_batch"):
        validate(RunConfig, tiny("batch.micro_batch=automatic"))
