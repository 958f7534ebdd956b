"""Claim: the peak memory of a training step is within 10% of what `task=plan` and `batch.micro_batch: auto` predict.

    python benchmarks/memory.py [--device cpu|cuda] [--cases CASE ...]

Each case is the training step of a configuration (two micro-batches or more, clipping, update), in a separate process,
on sequences of random tokens. The measurement covers the second step: on CUDA the peak that torch has allocated; on a
CPU the peak that torch's allocator has handed out, on top of parameters and optimizer state. The prediction uses the
configuration alone, before anything is allocated. Neither figure includes workspace that libraries allocate themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from side_by_side import show

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from pretune.core.batch import Batch
from pretune.core.config import validate
from pretune.launch.compose import composed, plain
from pretune.launch.groups import CONFIGS
from pretune.memory.estimate import Footprint
from pretune.optim.optimizers import build_optimizer, clip_gradients
from pretune.run.config import RunConfig
from pretune.run.losses import training_loss
from pretune.run.model import apply_precision, merged_model
from pretune.run.parts import Parts
from pretune.run.precision import resolved_config

SMALL = [
    *("model=nano", "model.vocab_size=8192"),
    *("data.sequence_length=256", "batch.micro_batch=8", "batch.tokens=4096"),
]
CASES = {
    "nano": SMALL,
    "nano, eager": [*SMALL, "precision.compile=false"],
    "nano, checkpointed": [*SMALL, "precision.activation_checkpointing=true"],
    "nano, eager, checkpointed": [*SMALL, "precision.compile=false", "precision.activation_checkpointing=true"],
    "nano, fp32": [*SMALL, "precision=fp32"],
    "nano, muon, documents apart": [
        *SMALL,
        "optimizer=muon",
        "data.packing.isolate=true",
        "model.activation=relu_squared",
        "model.tied_embeddings=false",
    ],
    "14M, 512 tokens": [
        *("model=nano", "model.vocab_size=8192"),
        *("data.sequence_length=512", "batch.micro_batch=8", "batch.tokens=8192"),
        *("model.num_layers=6", "model.dim=384", "model.num_heads=6", "model.num_kv_heads=6", "model.mlp_dim=1024"),
    ],
    # A row of the length to which the third reference stretches this model, its documents apart.
    "SmolLM-135M, 10,240 tokens, checkpointed": [
        *("model=smollm_135m", "model.max_sequence_length=10240", "data.sequence_length=10240", "batch.tokens=20480"),
        *("batch.micro_batch=1", "data.packing.isolate=true", "stage.objective.chunk_tokens=1024"),
        *("precision.activation_checkpointing=true", "precision.compile=false"),
    ],
}


def main() -> None:
    """Measure every case; print a line for each, a table, and the claim last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(figures(configured(options.case, options.device), torch.device(options.device))))
        return
    results = {}
    for case in options.cases:
        command = [sys.executable, __file__, "--device", options.device, "--case", case]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{case} failed:\n{done.stderr[-2000:]}")
        results[case] = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps({"side": case, **results[case]}), flush=True)
    show(f"peak memory of a training step on {options.device}", results)
    worst = max((abs(one["predicted_over_measured"] - 1) for one in results.values()), default=0.0)
    claim = f"peak memory of a training step ({options.device}) is within 10% of the prediction"
    print(json.dumps({"claim": claim, "ratio": round(worst / 0.1, 3), "holds": worst <= 0.1, "sides": results}))


def configured(case: str, device: str) -> RunConfig:
    """The case's run, from base.yaml, in the precision that the device does fast."""
    file = CONFIGS / "base.yaml"
    with composed(file, ["name=memory", "budget.steps=1", f"device={device}", *CASES[case]]) as config:
        return resolved_config(validate(RunConfig, plain(config, file)), None)


def figures(config: RunConfig, device: torch.device) -> dict[str, float]:
    """Predicted and measured bytes."""
    assert config.batch.micro_batch != "auto"
    predicted = Footprint(config, device.type).peak(config.batch.micro_batch)
    measured = measured_peak(config, device)
    return {
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "predicted_over_measured": round(predicted / measured, 4),
    }


def measured_peak(config: RunConfig, device: torch.device) -> int:
    """Peak bytes of the whole training, over its second step."""
    model = merged_model(config, None, device)
    apply_precision(config.precision, model)
    optimizer = build_optimizer(config.optimizer, model)
    loss_of = training_loss(config, Parts(device, None, None, model), config.precision.compile)  # type: ignore[arg-type]
    rows, length = config.batch.tokens // config.data.sequence_length, config.data.sequence_length
    tokens = torch.randint(0, config.model.vocab_size, (rows, length + 1)).to(device)
    documents = torch.zeros(rows, length, dtype=torch.int32, device=device) if config.data.packing.isolate else None
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), documents)
    at_once = config.batch.micro_batch
    assert at_once != "auto"

    def step() -> None:
        for start in range(0, rows, at_once):
            (loss_of(batch.part(start, start + at_once))["loss"] / tokens.numel()).backward()
        clip_gradients(model, config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    return kept_bytes(model, optimizer) + highest(step)


def kept_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters and optimizer state."""
    state = [value for slots in optimizer.state.values() for value in slots.values() if torch.is_tensor(value)]
    return sum(tensor.nbytes for tensor in [*model.parameters(), *state])


def highest(work: Callable[[], object]) -> int:
    """Peak bytes that torch's CPU allocator hands out while `work` runs, on top of what was allocated before."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # silences the profiler's startup message
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        most = max(most, now)
    return most


if __name__ == "__main__":
    main()
