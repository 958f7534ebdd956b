"""A .pte in ExecuTorch's runtime against the same model in eager PyTorch: decoding speed, memory, size, on this CPU.

Sides, each in a separate process, taking turns: `eager` (float32, our decoder), `pte_float` (float32), `pte`
(int8_int4: 4-bit weights and tables, 8-bit inputs). All use random weights, one text, and `--new` tokens after a prompt
of 64; figures are the median of `--repeats`. Memory is what loading and generation add to a process whose libraries are
loaded. Size is that of the file over that of the weights in bfloat16. ExecuTorch uses all available cores, so compare
on one, with `taskset -c 0`. The last line has `ratio`: the speed of `pte` over that of `eager`.

    taskset -c 0 python benchmarks/phone.py [--shape tiny|14m|30m] [--sides eager pte_float pte]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from side_by_side import Figures, llama, peak_memory, reset_peak_memory, show

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from generation import SHAPES as GENERATION_SHAPES
from pretune.generation.decode import Decoder, LanguageModel, Vocabulary
from pretune.model.transformer import Transformer
from pretune.quantization.config import Int8Int4Config
from pretune.quantization.convert import convert
from pretune.runtimes.executorch.lowering import Interface, lower
from pretune.runtimes.executorch.program import Program, load_runtime

SHAPES: dict[str, dict[str, int]] = {
    "tiny": GENERATION_SHAPES["tiny"],
    "14m": {"num_layers": 6, "dim": 384, "num_heads": 6, "num_kv_heads": 6, "mlp_dim": 1024, "vocab_size": 4096},
    "30m": GENERATION_SHAPES["30m"],
}
SIDES = ("eager", "pte_float", "pte")
CONTEXT, PROMPT = 512, 64
ROUNDED = Int8Int4Config(kind="int8_int4", group_size=32, embedding="int4", head="int4")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="14m")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--new", type=int, default=128, help="tokens to write after the prompt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of eager PyTorch")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side is not None:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        report(args, Path(folder))


def report(args: argparse.Namespace, folder: Path) -> None:
    """Lower the models, run each side in a process, print the results."""
    seconds = {side: write(side, args.shape, folder) for side in args.sides if side != "eager"}
    command = [sys.executable, __file__, "--shape", args.shape, "--folder", str(folder), "--new", str(args.new)]
    command += ["--repeats", str(args.repeats), "--threads", str(args.threads), "--side"]
    rows: dict[str, dict[str, Any]] = {}
    bfloat16 = 2 * sum(parameter.numel() for parameter in random_model(args.shape).parameters())
    for side in args.sides:
        output = subprocess.run([*command, side], capture_output=True, text=True, check=True).stdout
        rows[side] = json.loads(output.splitlines()[-1])
        if side in seconds:
            size = (folder / f"{side}.pte").stat().st_size
            rows[side] |= {"file_bytes": size, "over_bfloat16": size / bfloat16, "lowering_seconds": seconds[side]}
    for side, row in rows.items():
        row["over_eager"] = row["tokens_per_second"] / rows["eager"]["tokens_per_second"] if "eager" in rows else None
        print(json.dumps({"side": side, "shape": args.shape, **row}))
    show(f"{args.shape}: {bfloat16 / 2e6:.1f}M parameters, one text", rows)
    claim = f"decoding a .pte ({args.shape}, one text), tokens/s over eager PyTorch"
    print(json.dumps({"claim": claim, "target": 2.0, "ratio": rows.get("pte", {}).get("over_eager"), "sides": rows}))


def random_model(shape: str) -> Transformer:
    init = {"std": 0.05, "embedding_std": 0.05, "head_std": 0.05, "output": "scaled"}
    model = Transformer(llama(**SHAPES[shape], max_sequence_length=CONTEXT, tied_embeddings=False, init=init)).eval()
    model.reset_parameters(torch.Generator().manual_seed(1))
    return model


def write(side: str, shape: str, folder: Path) -> float:
    """Lower a side's model into the folder; return the seconds it took."""
    begun, model = time.perf_counter(), random_model(shape)
    if side == "pte":
        convert(model, ROUNDED)
    for _ in lower(model, Interface(CONTEXT, SHAPES[shape]["vocab_size"], (0,)), folder / f"{side}.pte"):
        pass
    return time.perf_counter() - begun


def measure(args: argparse.Namespace) -> Figures:
    """One side: new tokens per second, milliseconds for the prompt, bytes added to the process."""
    torch.set_num_threads(args.threads)
    if args.side != "eager":
        load_runtime()
    before = reset_peak_memory("cpu")
    model: LanguageModel = (
        random_model(args.shape) if args.side == "eager" else Program(args.folder / f"{args.side}.pte")
    )
    decoder = Decoder(model, Vocabulary(SHAPES[args.shape]["vocab_size"], frozenset()), torch.device("cpu"))
    bursts = [burst(decoder, args.new) for _ in range(args.repeats + 1)][1:]
    reading, writing = (statistics.median(seconds) for seconds in zip(*bursts, strict=True))
    return {
        "tokens_per_second": args.new / writing,
        "prompt_ms": 1000 * reading,
        "added_bytes": peak_memory("cpu") - before,
    }


def burst(decoder: Decoder, num_new: int) -> tuple[float, float]:
    """Seconds for the prompt, and for the tokens after it."""
    begun = time.perf_counter()
    logits, cache = decoder.read([list(range(PROMPT))], num_new)
    read = time.perf_counter()
    for _ in range(num_new):
        logits = decoder.next(logits.argmax(-1), cache)
    return read - begun, time.perf_counter() - read


if __name__ == "__main__":
    main()
