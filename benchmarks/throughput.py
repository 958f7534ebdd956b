"""Training step of Pretune's transformer against transformers' LlamaForCausalLM: tokens per second and peak memory.

Both sides: same shape, same batch, bf16 autocast, torch.compile, forward, backward, clipping, fused AdamW. Each side is
a process of its own, warmed up first; then they take turns, a burst of steps each, while the others wait. Pretune sets
the C library's allocator for training on a CPU, so there is a third side: transformers with the same setting.

Memory is what training takes at its peak: parameters, optimizer state, gradients and activations. On CUDA that is what
torch has allocated; on a CPU, resident memory at its peak, less that between two steps, plus parameters and optimizer
state, so that the Python process and the libraries (400 MB) are not in it. `process_bytes` is all of the process.

    python benchmarks/throughput.py [nano|14m] [--device cpu|cuda] [--bursts 9] [--seconds 4] [--threads 2]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))


@dataclass(frozen=True)
class Shape:
    num_layers: int
    dim: int
    num_heads: int
    mlp_dim: int
    vocab_size: int
    sequence_length: int
    micro_batch: int
    head_dim: int = 64


SHAPES = {
    "nano": Shape(4, 256, 4, 704, 4096, 256, 16),
    "14m": Shape(6, 384, 6, 1024, 8192, 512, 8),
}
SIDES = ("pretune", "transformers", "transformers_tuned_allocator")
CHUNK_TOKENS = 1024
Loss = Callable[[Tensor, Tensor], Tensor]
"""Mean loss from inputs and targets [B, T]."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", nargs="?", choices=SHAPES, default="nano")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bursts", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a burst")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.side:
        work(args.side, SHAPES[args.shape], args.device)
    else:
        print(json.dumps(compare(args)))


def compare(args: argparse.Namespace) -> dict[str, object]:
    """Let the sides take turns; the figures of a side are the median over its bursts."""
    workers = {side: start(side, args) for side in SIDES}
    results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(args.bursts):
        for side, worker in workers.items():
            results[side].append(ask(worker, args.seconds))
            print(json.dumps({"side": side, "shape": args.shape, **results[side][-1]}), flush=True)
    for worker in workers.values():
        worker.communicate()
    median = {
        side: {figure: statistics.median(burst[figure] for burst in bursts) for figure in bursts[0]}
        for side, bursts in results.items()
    }

    def ratio(figure: str, other: str) -> float:
        return round(median["pretune"][figure] / median[other][figure], 3)

    return {
        "claim": f"training step ({args.shape}, {args.device}): tokens per second, and peak memory of training, "
        "against transformers' LlamaForCausalLM compiled",
        "ratio": ratio("tokens_per_second", "transformers"),
        "ratio_tuned_allocator": ratio("tokens_per_second", "transformers_tuned_allocator"),
        "memory_ratio": ratio("training_bytes", "transformers"),
        **median,
        "threads": args.threads,
        "torch": torch.__version__,
    }


def start(side: str, args: argparse.Namespace) -> subprocess.Popen[str]:
    """A process that has compiled and warmed up its side."""
    options = ["--device", args.device, "--threads", str(args.threads), "--side", side]
    command = [sys.executable, __file__, args.shape, *options]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    if worker.stdout.readline().strip() != "ready":
        sys.exit(f"{side} did not start; run `{' '.join(command)}` to see why")
    return worker


def ask(worker: subprocess.Popen[str], seconds: float) -> dict[str, float]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    print(seconds, file=worker.stdin, flush=True)
    return json.loads(worker.stdout.readline())


def work(side: str, shape: Shape, device: str) -> None:
    """One side: warm up, then for each line on standard input train for that many seconds and print the figures."""
    from pretune.compilation import keep_freed_memory

    torch.manual_seed(0)
    if side != "transformers":
        keep_freed_memory()
    model, loss_of = pretune_side(shape, device) if side == "pretune" else transformers_side(shape, device)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    tokens = torch.randint(0, shape.vocab_size, (shape.micro_batch, shape.sequence_length + 1)).to(device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> Tensor:
        loss = loss_of(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    for _ in range(4):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        kept = [*model.parameters(), *(x for state in optimizer.state.values() for x in state.values())]
        print(json.dumps(burst(step, float(line), inputs.numel(), kept, device)), flush=True)


def burst(
    step: Callable[[], Tensor], seconds: float, tokens_per_step: int, kept: list[Tensor], device: str
) -> dict[str, float]:
    """Train for some seconds; `kept` is what training holds between two steps."""
    at_rest = reset_peak_memory(device)
    step()  # caches are cold after the other sides' turns
    num_steps, began, cpu_began, loss = 0, time.perf_counter(), time.process_time(), 0.0
    while time.perf_counter() - began < seconds:
        loss = step().item()
        num_steps += 1
    elapsed, cpu_elapsed, peak = time.perf_counter() - began, time.process_time() - cpu_began, peak_memory(device)
    return {
        "tokens_per_second": round(num_steps * tokens_per_step / elapsed, 1),
        "cpu_seconds_per_step": round(cpu_elapsed / num_steps, 4),
        "training_bytes": peak - at_rest + sum(tensor.nbytes for tensor in kept),
        "process_bytes": peak,
        "loss": round(loss, 4),
    }


def pretune_side(shape: Shape, device: str) -> tuple[nn.Module, Loss]:
    from pretune.batch import Batch
    from pretune.compilation import compile_step
    from pretune.config import validate
    from pretune.model.config import ModelConfig
    from pretune.model.transformer import Transformer
    from pretune.objectives.language_modeling import language_modeling

    config = {
        "num_layers": shape.num_layers,
        "dim": shape.dim,
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_heads,
        "head_dim": shape.head_dim,
        "mlp_dim": shape.mlp_dim,
        "vocab_size": shape.vocab_size,
        "vocab_multiple_of": 64,
        "max_sequence_length": shape.sequence_length,
        "activation": "swiglu",
        "norm": {"kind": "rmsnorm", "eps": 1e-5, "learned": True},
        "qk_norm": False,
        "attention_scale": 1.0,
        "window": None,
        "value_embeddings": False,
        "residual_scalars": False,
        "normalize_embedding": False,
        "bias": {"qkv": False, "attention_output": False, "mlp": False},
        "tied_embeddings": True,
        "dropout": 0.0,
        "softcap": None,
        "init": {"std": 0.02, "embedding_std": 0.02, "head_std": 0.02, "output": "scaled"},
        "rope": {"theta": 1e4, "fraction": 1.0},
    }
    model = Transformer(validate(ModelConfig, config))
    model.reset_parameters(torch.Generator().manual_seed(0))
    model = model.to(device)
    compiled = compile_step(lambda batch: language_modeling(model, batch, CHUNK_TOKENS))

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return compiled(Batch(inputs, targets, None)) / targets.numel()

    return model, loss_of


def transformers_side(shape: Shape, device: str) -> tuple[nn.Module, Loss]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.dim,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.mlp_dim,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.sequence_length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model: Any = LlamaForCausalLM(config)  # attention through SDPA, its default
    compiled = torch.compile(model.to(device), dynamic=False)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return compiled(input_ids=inputs, labels=targets, shift_labels=targets).loss

    return model, loss_of


def reset_peak_memory(device: str) -> int:
    """Bytes in use now, between two steps, from which the peak is counted anew."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark of resident memory
    return status("VmRSS")


def peak_memory(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM")


def status(field: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


if __name__ == "__main__":
    main()
