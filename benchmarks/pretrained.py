"""A model of others: reading its weights against safetensors, and steps against peft and transformers compiled.

    python benchmarks/pretrained.py [--parts import lora step] [--shape smollm-135m|tiny]
        [--import-shape qwen2.5-0.5b|tiny] [--dtype float32] [--rows 4] [--length 512] [--bursts 5] [--seconds 20]
        [--threads N]

import: the seconds from a folder to a model whose weights are all in memory, and the peak of resident memory on the
way, in processes of their own. safetensors' side is `load_file` and a copy of each tensor, because `load_file` alone
reads nothing yet. The file is in the page cache for both. Our weights are always float32.

lora: rank 16 on all linear layers of the blocks, bf16 autocast, forward, backward, clipping, fused AdamW; the same
weights and the same batch. The sides take turns, a burst of steps each; figures are medians over the bursts.

step: the same with all parameters trained, by our transformer, by model=transformers, and by transformers' own loop,
with and without the setting of the C library's allocator that our loop makes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adapters_speed import burst
from side_by_side import medians, peak_memory, reset_peak_memory, show, take_turns

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768,
    },
    "smollm-135m": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 2048,
    },
    "tiny": {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 512, "max_position_embeddings": 2048,
    },
}  # fmt: skip
"""What config.json of these models says of their sizes."""
PARTS = ["import", "lora", "step"]
LOOPS = ("pretune", "model=transformers", "transformers", "transformers_tuned_allocator")
RANK = 16
CHUNK_TOKENS = 1024
Loss = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--shape", choices=SHAPES, default="smollm-135m")
    parser.add_argument("--import-shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the folder's weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--bursts", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a burst")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.side in READERS:
        print(json.dumps(measured_reading(args.side, args.folder)))
    elif args.side:
        work(args)
    else:
        if "import" in args.parts:
            print(json.dumps(compare_reading(args)))
        if "lora" in args.parts:
            print(json.dumps(compare_lora(args)))
        if "step" in args.parts:
            print(json.dumps(compare_step(args)))


def write_model(shape: str, folder: Path, dtype: str) -> Path:
    """A model of that shape with random weights, as transformers saves it."""
    import transformers

    sizes = dict(SHAPES[shape])
    config = transformers.AutoConfig.for_model(sizes.pop("model_type"), tie_word_embeddings=True, **sizes)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def with_safetensors(folder: Path) -> Any:
    from safetensors.torch import load_file

    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def with_pretune(folder: Path, kind: Literal["own", "transformers"] = "own") -> Any:
    from pretune.run.model import without_values
    from pretune.run.pretrained import PretrainedModel

    start = PretrainedModel(folder, str(folder))
    model = without_values(start.config(kind))
    start.load(model)
    return model


READERS: dict[str, Callable[[Path], Any]] = {"safetensors": with_safetensors, "read by pretune": with_pretune}


def measured_reading(side: str, folder: Path) -> dict[str, float]:
    import pretune.model.huggingface.folder
    import pretune.run.model  # noqa: F401  # neither side pays for imports

    at_rest, began = reset_peak_memory("cpu"), time.perf_counter()
    kept = READERS[side](folder)
    seconds = time.perf_counter() - began
    del kept
    return {"seconds": round(seconds, 3), "peak_bytes": peak_memory("cpu") - at_rest}


def compare_reading(args: argparse.Namespace) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_model(args.import_shape, Path(temporary), args.dtype)
        stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        results: dict[str, list[dict[str, float]]] = {side: [] for side in READERS}
        for _ in range(args.bursts):
            for side, found in results.items():
                command = [sys.executable, __file__, "--side", side, "--folder", temporary]
                command += ["--threads", str(args.threads)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found.append(json.loads(done.stdout))
                print(json.dumps({"side": side, **found[-1]}), flush=True)
    fastest = {side: min(one["seconds"] for one in found) for side, found in results.items()}
    peaks = {side: statistics.median(one["peak_bytes"] for one in found) for side, found in results.items()}
    figures = {side: {"seconds": fastest[side], "peak_bytes": peaks[side]} for side in results}
    show(f"{args.import_shape}, stored in {args.dtype} ({stored / 2**20:,.0f} MiB)", figures)
    return {
        "claim": f"reading the weights of {args.import_shape} ({args.dtype}): seconds over those of safetensors, at "
        "most 1.2; peak memory over the stored weights, at most 1.2",
        "ratio": round(fastest["read by pretune"] / fastest["safetensors"], 3),
        "memory_ratio": round(peaks["read by pretune"] / stored, 3),
        "threads": args.threads,
        "torch": torch.__version__,
    }


def compare_lora(args: argparse.Namespace) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as temporary:
        write_model(args.shape, Path(temporary), "float32")
        sides = ["pretune", "peft and transformers"]
        more = ["--folder", temporary, "--rows", str(args.rows), "--length", str(args.length)]
        median = medians(take_turns(__file__, sides, "--parts=lora", args, more))
    show(f"LoRA of rank {RANK} on {args.shape}, {args.rows} x {args.length} tokens on {args.device}", median)
    ours, theirs = (median[side] for side in sides)
    return {
        "claim": f"a LoRA step of {args.shape} ({args.device}): speed over peft's and transformers' compiled, at least "
        "1.3; memory of training, at most 0.8",
        "ratio": round(theirs["seconds"] / ours["seconds"], 3),
        "memory_ratio": round(ours["training_bytes"] / theirs["training_bytes"], 3),
        "losses": [ours["loss"], theirs["loss"]],
        "threads": args.threads,
        "torch": torch.__version__,
    }


def compare_step(args: argparse.Namespace) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as temporary:
        write_model(args.shape, Path(temporary), "float32")
        more = ["--folder", temporary, "--rows", str(args.rows), "--length", str(args.length)]
        median = medians(take_turns(__file__, LOOPS, "--parts=step", args, more))
    show(f"a step of {args.shape}, all parameters, {args.rows} x {args.length} tokens on {args.device}", median)
    ours, hosted, theirs, tuned = (median[side]["seconds"] for side in LOOPS)
    return {
        "claim": f"a step of {args.shape} ({args.device}): seconds by model=transformers over those of transformers' "
        "own loop compiled, at most 1.05; speed of our transformer over that of model=transformers, at least 1.2",
        "ratio": round(hosted / theirs, 3),
        "ratio_tuned_allocator": round(hosted / tuned, 3),
        "own_ratio": round(hosted / ours, 3),
        "losses": [median[side]["loss"] for side in LOOPS],
        "threads": args.threads,
        "torch": torch.__version__,
    }


def work(args: argparse.Namespace) -> None:
    """One side: warm up, then, for each number on standard input, train for that many seconds and print the figures."""
    from pretune.compute.compilation import keep_freed_memory

    if args.side in ("pretune", "model=transformers", "transformers_tuned_allocator"):
        keep_freed_memory()
    if args.parts == ["step"]:
        model, loss_of = loop_side(args.side, args.folder, args.device)
    else:
        model, loss_of = (pretune_side if args.side == "pretune" else peft_side)(args.folder, args.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(1)
    count = json.loads((args.folder / "config.json").read_text())["vocab_size"]
    tokens = torch.randint(0, count, (args.rows, args.length + 1), generator=generator).to(args.device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> Tensor:
        with torch.autocast(args.device, torch.bfloat16):
            loss = loss_of(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    for _ in range(4):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        held = sum(one.nbytes for one in model.parameters())
        held += sum(slot.nbytes for slots in optimizer.state.values() for slot in slots.values())
        print(json.dumps(burst(step, float(line), held, args.device, time.perf_counter)), flush=True)


def loop_side(side: str, folder: Path, device: str) -> tuple[nn.Module, Loss]:
    """A model of which all parameters are trained, by our loss or by transformers' own."""
    import transformers

    from pretune.compute.compilation import compile_step
    from pretune.core.batch import Batch
    from pretune.objectives.language_modeling import language_modeling

    if side.startswith("transformers"):
        theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        theirs.to(device).train()
        theirs.config.use_cache = False
        whole = torch.compile(theirs, dynamic=False)
        return theirs, lambda inputs, targets: whole(input_ids=inputs, labels=targets, shift_labels=targets).loss
    model = with_pretune(folder, "own" if side == "pretune" else "transformers").to(device)
    compiled = compile_step(lambda batch: language_modeling(model, batch, CHUNK_TOKENS))
    return model, lambda inputs, targets: compiled(Batch(inputs, targets, None)) / targets.numel()


def pretune_side(folder: Path, device: str) -> tuple[nn.Module, Loss]:
    import pydantic

    from pretune.adapters.attach import attach
    from pretune.adapters.config import AdapterConfig
    from pretune.compute.compilation import compile_step
    from pretune.core.batch import Batch
    from pretune.objectives.language_modeling import language_modeling

    section = {"kind": "lora", "rank": RANK, "alpha": float(RANK), "dropout": 0.0, "targets": ("all",)}
    section |= {"rslora": False, "init": "zero", "lr_ratio": 1.0, "init_from": None}
    model = with_pretune(folder).to(device)
    attach(model, pydantic.TypeAdapter(AdapterConfig).validate_python(section), seed=0)
    compiled = compile_step(lambda batch: language_modeling(model, batch, CHUNK_TOKENS))
    return model, lambda inputs, targets: compiled(Batch(inputs, targets, None)) / targets.numel()


def peft_side(folder: Path, device: str) -> tuple[nn.Module, Loss]:
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base.config.use_cache = False
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config).to(device)
    compiled = torch.compile(model, dynamic=False)
    return model, lambda inputs, targets: compiled(input_ids=inputs, labels=targets, shift_labels=targets).loss


if __name__ == "__main__":
    main()
