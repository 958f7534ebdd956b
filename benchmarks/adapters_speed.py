"""Training step with each adapter against full fine-tuning and against peft's own layers: seconds and peak memory.
Also QLoRA (LoRA on 4-bit weights) against LoRA on bf16 weights.

All sides have the same model (14m: 6 layers x 384, 512-token sequences), the same batch, bf16 autocast, torch.compile,
forward, backward, clipping, fused AdamW; adapters of rank 8 on all linear layers. Each side is a separate process,
warmed up first. The sides then take turns, a burst of steps each, while the others wait. A step's time is the lowest
median of all bursts, because other load on the machine only ever adds to it. On a shared machine, `--threads 1` counts
CPU time of the process instead of wall time.

Memory is the peak that training takes: weights, gradients, optimizer state and activations (on a CPU, peak resident
memory minus that between two steps, plus weights and optimizer state). `process_bytes` is the whole process; all sides
load the same libraries, and it includes what compiling left. Activations grow with `--rows`, weights do not: with one
sequence the weights are a larger share.

    python benchmarks/adapters_speed.py [--shape tiny|nano|14m|180m] [--device cpu|cuda] [--threads N] [--bursts 7]
        [--seconds 4] [--rows 8] [--sides full ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from side_by_side import ask, peak_memory, reset_peak_memory, start
from throughput import SHAPES, Shape, pretune_side

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

KINDS: tuple[str, ...] = ("lora", "dora", "loha", "lokr")
SIDES = ("full", *KINDS, *(f"{kind} by peft" for kind in KINDS), "lora in bf16", "qlora")
RANK = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="14m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bursts", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a burst")
    parser.add_argument("--rows", type=int, help="sequences; the shape's micro-batch, unless it is said")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.rows = args.rows or SHAPES[args.shape].micro_batch
    if args.side:
        torch.set_num_threads(args.threads)
        clock = time.process_time if args.threads == 1 else time.perf_counter
        work(args.side, SHAPES[args.shape], args.device, args.rows, clock)
    else:
        print(json.dumps(compare(args)))


def compare(args: argparse.Namespace) -> dict[str, object]:
    """Let the sides take turns."""
    command, shape = [__file__, "--shape", args.shape, "--rows", str(args.rows)], SHAPES[args.shape]
    workers = {side: start(command, side, args.device, args.threads) for side in args.sides}
    results: dict[str, list[dict[str, float]]] = {side: [] for side in workers}
    for _ in range(args.bursts):
        for side, worker in workers.items():
            results[side].append(ask(worker, args.seconds))
            print(json.dumps({"side": side, **results[side][-1]}), flush=True)
    for worker in workers.values():
        worker.communicate()
    seconds = {side: min(burst["seconds"] for burst in bursts) for side, bursts in results.items()}
    memory, process = (
        {side: statistics.median(burst[figure] for burst in bursts) for side, bursts in results.items()}
        for figure in ("training_bytes", "process_bytes")
    )

    def ratios(figures: dict[str, float], pairs: dict[str, str]) -> dict[str, float]:
        there = {one: other for one, other in pairs.items() if one in figures and other in figures}
        return {f"{one} / {other}": round(figures[one] / figures[other], 3) for one, other in there.items()}

    to_full = dict.fromkeys(KINDS, "full")
    times = ratios(seconds, to_full) | ratios(seconds, dict.fromkeys(KINDS[1:], "lora"))
    return {
        "claim": f"training step with adapters of rank {RANK} ({shape.num_layers} x {shape.dim}, {args.device}): "
        "LoRA's time over full fine-tuning's; at most 1, and the others at most 1.25 times LoRA's",
        "ratio": times.get("lora / full"),
        "seconds": seconds,
        "time_ratios": times | ratios(seconds, {kind: f"{kind} by peft" for kind in KINDS} | {"qlora": "lora in bf16"}),
        "memory_ratios": ratios(memory, to_full | {"qlora": "lora in bf16"}),
        "weight_bytes": {side: bursts[-1]["weight_bytes"] for side, bursts in results.items()},
        "training_bytes": memory,
        "process_bytes": process,
        "rows": args.rows,
        "threads": args.threads,
        "torch": torch.__version__,
    }


def work(side: str, shape: Shape, device: str, rows: int, clock: Callable[[], float]) -> None:
    """One side: warm up, then, for each number on standard input, train for that many seconds and print the figures."""
    import pretune.adapters.attach  # noqa: F401  # so that every side pays for the import

    torch.manual_seed(0)
    model, loss_of = pretune_side(shape, device)
    if side != "full":
        adapt(model, side.split()[0].removeprefix("q"), quick="peft" not in side)
    if side == "qlora":
        from pretune.quantization.config import QloraConfig
        from pretune.quantization.nf4 import quantize

        quantize(model, QloraConfig(kind="qlora_nf4", block_size=64))
    if side == "lora in bf16":
        from pretune.quantization.nf4 import frozen_layers

        for layer in frozen_layers(model).values():
            layer.bfloat16()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), fused=True)
    tokens = torch.randint(0, shape.vocab_size, (rows, shape.sequence_length + 1)).to(device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> Tensor:
        loss = loss_of(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    for _ in range(4):
        step()
    # A compilation from here on would be a mistake and would falsify the time.
    with torch._dynamo.config.patch(error_on_recompile=True):
        print("ready", flush=True)
        for line in sys.stdin:
            stored, state = weights(model), [x for slots in optimizer.state.values() for x in slots.values()]
            found = burst(step, float(line), sum(one.nbytes for one in (*stored, *state)), device, clock)
            print(json.dumps({**found, "weight_bytes": sum(one.nbytes for one in stored)}), flush=True)


def weights(model: nn.Module) -> list[Tensor]:
    """The tensors that store the model's parameters."""
    layers = [module for module in model.modules() if hasattr(module, "stored")]
    compressed = {id(layer.weight) for layer in layers}
    plain = [parameter for parameter in model.parameters() if id(parameter) not in compressed]
    return [*plain, *(tensor for layer in layers for tensor in layer.stored())]  # pyright: ignore


def adapt(model: nn.Module, kind: str, quick: bool) -> None:
    """Attach an adapter to the model, with our layers or with peft's."""
    import pydantic

    from pretune.adapters import attach
    from pretune.adapters.config import AdapterConfig

    section: dict[str, object] = {"kind": kind, "rank": RANK, "alpha": 8.0, "dropout": 0.0, "targets": ("all",)}
    own = {"lora": {"rslora": False, "init": "zero", "lr_ratio": 1.0}, "loha": {}, "lokr": {"factor": None}}
    own["dora"] = own["lora"]
    config = pydantic.TypeAdapter(AdapterConfig).validate_python({**section, **own[kind], "init_from": None})
    if not quick:
        attach.use_fast_layers = lambda model: None
    attach.attach(model, config, seed=0)


def burst(
    step: Callable[[], Tensor], seconds: float, held: int, device: str, clock: Callable[[], float]
) -> dict[str, float]:
    """Train for some seconds; `held` is the bytes that training holds between two steps."""
    step()  # caches are cold after the other sides' turns
    at_rest = reset_peak_memory(device)
    times: list[float] = []
    loss = float("nan")
    while sum(times) < seconds:
        began = clock()
        loss = step().item()  # waits for the device
        times.append(clock() - began)
    peak = peak_memory(device)
    return {
        "seconds": round(statistics.median(times), 5),
        "training_bytes": peak - at_rest + held,
        "process_bytes": peak,
        "loss": round(loss, 4),
    }


if __name__ == "__main__":
    main()
