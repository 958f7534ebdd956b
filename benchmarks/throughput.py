r"""Training step of Pretune's transformer against transformers' LlamaForCausalLM and litgpt's GPT: tokens per second
and peak memory.

All sides have the same shape, batch and precision, torch.compile, forward, backward, clipping, fused AdamW. Each side
is a separate process, warmed up first; then the sides take turns, a burst of steps each, while the others wait. Pretune
sets the C library's allocator for training on a CPU, so there is one more side: transformers with the same setting.

`matmul_share` is the model's FLOP/s (by PaLM's formula) as a share of the rate of a large matrix product in the same
precision, measured on the same device in the same run. Memory is the peak that training takes: parameters, optimizer
state, gradients and activations. On CUDA it is what torch has allocated. On a CPU it is peak resident memory minus that
between two steps, plus parameters and optimizer state, so it does not include the Python process and the libraries (400
MB). `process_bytes` is the whole process.

litgpt is left out unless it is installed. It needs older libraries than Pretune, so it gets its own folder:

    pip install --no-deps --target .cache/litgpt litgpt==0.5.13 lightning==2.6.6 lightning-utilities==0.15.3 \
        torchmetrics==1.9.0

    python benchmarks/throughput.py [tiny|nano|14m|180m] [--precision fp32|bf16|fp16] [--device cpu|cuda] [--bursts 9]
        [--seconds 4] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from side_by_side import llama, medians, peak_memory, reset_peak_memory, show, take_turns

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "src"))
LITGPT = ROOT / ".cache" / "litgpt"


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
    "tiny": Shape(1, 64, 1, 192, 4096, 64, 2),  # too small to measure: does it work?
    "nano": Shape(4, 256, 4, 704, 4096, 256, 16),
    "14m": Shape(6, 384, 6, 1024, 8192, 512, 8),
    "180m": Shape(10, 1024, 16, 2816, 50304, 1024, 32),
}
SIDES = ("pretune", "transformers", "transformers_tuned_allocator", "litgpt")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES: dict[str, Literal["float32", "bfloat16", "float16"]] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
CHUNK_TOKENS = 1024
Loss = Callable[[Tensor, Tensor], Tensor]
"""Mean loss from inputs and targets [B, T]."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", nargs="?", choices=SHAPES, help="nano; on CUDA 180m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bursts", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a burst")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=DTYPES, help="what the device does fast, unless it is said")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.side:
        work(args.side, SHAPES[args.shape], args.device, DTYPES[args.precision])
        return
    shape = args.shape or ("180m" if args.device == "cuda" else "nano")
    args.precision = args.precision or fastest(args.device, SHAPES[shape])
    print(json.dumps(compare(args, shape)))


def fastest(device: str, shape: Shape) -> str:
    """The precision that `precision=auto` chooses."""
    from pretune.compute.choice import capabilities, choose
    from pretune.compute.config import OPTIONS
    from pretune.compute.hardware import measure_product

    here = torch.device(device)
    rate = partial(measure_product, here, inputs=shape.dim, outputs=shape.mlp_dim)
    return OPTIONS[choose(capabilities(here), rate).compute]


def compare(args: argparse.Namespace, shape: str) -> dict[str, object]:
    """Let the sides take turns; a side's figures are the median over its bursts."""
    from pretune.compute.hardware import measure_matmul

    matmul = measure_matmul(torch.device(args.device), NAMES[args.precision])
    if args.device == "cuda":
        torch.cuda.empty_cache()
    median = medians(take_turns(__file__, sides_here(args.device), shape, args, ["--precision", args.precision]))
    flops = flops_per_token(SHAPES[shape])
    for figures in median.values():
        figures["matmul_share"] = round(figures["tokens_per_second"] * flops / matmul, 4)
    show(f"{shape} on {args.device}: a {args.precision} matrix product reaches {matmul / 1e12:.3g} TFLOP/s", median)

    def ratio(figure: str, other: str) -> float | None:
        return round(median["pretune"][figure] / median[other][figure], 3) if other in median else None

    return {
        "claim": f"training step ({shape}, {args.precision}, {args.device}): tokens per second, and peak memory of "
        "training, against transformers' LlamaForCausalLM compiled",
        "ratio": ratio("tokens_per_second", "transformers"),
        "ratio_tuned_allocator": ratio("tokens_per_second", "transformers_tuned_allocator"),
        "ratio_litgpt": ratio("tokens_per_second", "litgpt"),
        "memory_ratio": ratio("training_bytes", "transformers"),
        "memory_ratio_litgpt": ratio("training_bytes", "litgpt"),
        "matmul_flops": matmul,
        **median,
        "threads": args.threads,
        "torch": torch.__version__,
    }


def sides_here(device: str) -> list[str]:
    """The sides that can be measured; prints which are left out, and why."""
    left_out = {"transformers_tuned_allocator"} if device == "cuda" else set()
    if not LITGPT.is_dir():
        left_out.add("litgpt")
        print(f"litgpt is left out: there is no {LITGPT.relative_to(ROOT)}. {__file__} says how to install it.")
    return [side for side in SIDES if side not in left_out]


def flops_per_token(shape: Shape) -> float:
    """Floating-point operations per token of a training step, as `train/mfu` counts them."""
    from pretune.model.costs import skeleton, training_flops

    return training_flops(skeleton(model_config(shape)), shape.sequence_length)


def work(side: str, shape: Shape, device: str, dtype: torch.dtype) -> None:
    """One side: warm up, then, for each number on standard input, train for that many seconds and print the figures."""
    from pretune.compute.compilation import keep_freed_memory

    torch.manual_seed(0)
    if side in ("pretune", "transformers_tuned_allocator"):
        keep_freed_memory()
    build = {"pretune": pretune_side, "litgpt": litgpt_side}.get(side, transformers_side)
    model, plain_loss_of = build(shape, device)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    tokens = torch.randint(0, shape.vocab_size, (shape.micro_batch, shape.sequence_length + 1)).to(device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> Tensor:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = plain_loss_of(inputs, targets)
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


def model_config(shape: Shape) -> Any:
    sizes = asdict(shape)
    del sizes["micro_batch"]
    length = sizes.pop("sequence_length")
    return llama(**sizes, num_kv_heads=shape.num_heads, max_sequence_length=length)


def pretune_side(shape: Shape, device: str) -> tuple[nn.Module, Loss]:
    from pretune.compute.compilation import compile_step
    from pretune.core.batch import Batch
    from pretune.model.transformer import Transformer
    from pretune.objectives.language_modeling import language_modeling

    model = Transformer(model_config(shape))
    model.reset_parameters(torch.Generator().manual_seed(0))
    model = model.to(device)
    compiled = compile_step(lambda batch: language_modeling(model, batch, CHUNK_TOKENS))

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
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
        return compiled(input_ids=inputs, labels=targets, shift_labels=targets).loss

    return model, loss_of


def litgpt_side(shape: Shape, device: str) -> tuple[nn.Module, Loss]:
    """As in `litgpt pretrain`: the model compiled, the loss outside it, in chunks."""
    sys.path.append(str(LITGPT))  # last, so that shared dependencies come from Pretune's environment
    from litgpt.config import Config  # pyright: ignore[reportMissingImports]
    from litgpt.model import GPT  # pyright: ignore[reportMissingImports]
    from litgpt.utils import chunked_cross_entropy  # pyright: ignore[reportMissingImports]

    config = Config(
        block_size=shape.sequence_length,
        n_layer=shape.num_layers,
        n_embd=shape.dim,
        n_head=shape.num_heads,
        head_size=shape.head_dim,
        intermediate_size=shape.mlp_dim,
        vocab_size=shape.vocab_size,
        padding_multiple=64,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        parallel_residual=False,
        rotary_percentage=1.0,
        bias=False,
    )
    model = GPT(config)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    model.transformer.wte.weight = model.lm_head.weight
    compiled = torch.compile(model.to(device), dynamic=False)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        return chunked_cross_entropy(compiled(inputs), targets)

    return model, loss_of


if __name__ == "__main__":
    main()
