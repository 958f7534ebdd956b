"""Greedy generation against transformers' `generate`: new tokens per second, 30M and 135M parameters, batch 1 and 8.

All sides use the same random weights, prompts and precision, no end token, and `--new` tokens. They run in one process
and take turns; figures are the median of `--repeats`. Ours is measured with the default settings (eager) and with a
compiled step; compilation happens before the measurement and its seconds are reported separately. `same_tokens` is the
share of tokens before the first that differs from transformers': 1.0 in float32. In bfloat16 two ways of rounding
diverge where two tokens are nearly tied.

    python benchmarks/generation.py [--shapes 30m 135m] [--batches 1 8] [--dtype bfloat16|float32] [--threads N]
        [--uncompiled]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from side_by_side import llama

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHAPES: dict[str, dict[str, int]] = {
    # Too small to measure: does it work?
    "tiny": {"num_layers": 1, "dim": 64, "num_heads": 1, "num_kv_heads": 1, "mlp_dim": 192, "vocab_size": 4096},
    "30m": {"num_layers": 8, "dim": 512, "num_heads": 8, "num_kv_heads": 8, "mlp_dim": 1408, "vocab_size": 8192},
    # SmolLM-135M
    "135m": {"num_layers": 30, "dim": 576, "num_heads": 9, "num_kv_heads": 3, "mlp_dim": 1536, "vocab_size": 49152},
}
PROMPT = 32
Write = Callable[[], list[list[int]]]
"""Generates text for the prompts; returns the new tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["30m", "135m"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--new", type=int, default=128, help="tokens to write after each prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--uncompiled", action="store_true", help="leave out the side that takes minutes to start")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = [measure(shape, batch, args) for shape in args.shapes for batch in args.batches]
    table(results)
    print(json.dumps({"claim": "generation, tokens/s over transformers' generate", "target": 2.0, "results": results}))


def measure(shape: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Let the sides take turns."""
    torch.compiler.reset()
    prompts = torch.randint(0, 4096, (batch, PROMPT), generator=torch.Generator().manual_seed(batch)).tolist()
    sides, compile_seconds = writers(shape, prompts, args)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    written: dict[str, list[list[int]]] = {}
    for _ in range(args.repeats):
        for side, write in sides.items():
            started = time.perf_counter()
            written[side] = write()
            seconds[side].append(time.perf_counter() - started)
            speed = batch * args.new / seconds[side][-1]
            print(json.dumps({"shape": shape, "batch": batch, "side": side, "tokens_per_second": speed}), flush=True)
    speeds = {side: batch * args.new / statistics.median(times) for side, times in seconds.items()}
    return {
        "shape": shape,
        "batch": batch,
        "dtype": args.dtype,
        "threads": args.threads,
        "tokens_per_second": speeds,
        "ratio": speeds.get("compiled", speeds["eager"]) / speeds["transformers"],
        "ratio_eager": speeds["eager"] / speeds["transformers"],
        "compile_seconds": compile_seconds,
        "same_tokens": {side: agreement(written[side], written["transformers"]) for side in sides},
    }


def writers(shape: str, prompts: list[list[int]], args: argparse.Namespace) -> tuple[dict[str, Write], float]:
    """Each side's generation function, warmed up, and the seconds that compiling took."""
    theirs, model = models(shape)
    sides = {"eager": ours(model, prompts, args, None), "transformers": transformers_side(theirs, prompts, args)}
    started = time.perf_counter()
    if not args.uncompiled:
        sides["compiled"] = ours(model, prompts, args, len(prompts))
        sides["compiled"]()
    return sides, time.perf_counter() - started


def models(shape: str) -> tuple[Any, Any]:
    """transformers' Llama with random weights, and our model with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from pretune.model.huggingface.weights import load_huggingface
    from pretune.model.transformer import Transformer

    size = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=size["dim"],
        intermediate_size=size["mlp_dim"],
        num_hidden_layers=size["num_layers"],
        num_attention_heads=size["num_heads"],
        num_key_value_heads=size["num_kv_heads"],
        vocab_size=size["vocab_size"],
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.06,  # spread widely enough that a text does not repeat one token
    )
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(config).eval()
    model = Transformer(llama(**size, max_sequence_length=config.max_position_embeddings))
    load_huggingface(theirs.state_dict(), model)
    return theirs, model.eval()


def ours(model: Any, prompts: list[list[int]], args: argparse.Namespace, compiled_rows: int | None) -> Write:
    from pretune.compute.compilation import compile_frozen
    from pretune.core.config import validate
    from pretune.generation.config import DecodingConfig
    from pretune.generation.decode import Compiled, Decoder, Decoding, Vocabulary
    from pretune.model.packed import packed

    greedy = {"max_new_tokens": args.new, "temperature": 0.0, "top_k": None, "top_p": None, "min_p": None,
              "repetition_penalty": 1.0, "frequency_penalty": 0.0, "num_beams": 1, "length_penalty": 1.0,
              "stop": [], "end_tokens": [], "seed": 0}  # fmt: skip
    config = validate(DecodingConfig, greedy)
    vocabulary = Vocabulary(model.config.vocab_size, frozenset())
    packed_copy = partial(packed, model, getattr(torch, args.dtype))
    compiled = None if compiled_rows is None else Compiled(compiled_rows, compile_frozen)
    decoder = Decoder(model, vocabulary, torch.device("cpu"), compiled, packed_copy)

    def write() -> list[list[int]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
            decoding = Decoding(decoder, prompts, config)
            for _ in range(args.new):
                decoding.next_tokens()
        return decoding.written

    return write


def transformers_side(model: Any, prompts: list[list[int]], args: argparse.Namespace) -> Write:
    import copy

    model = copy.deepcopy(model).to(getattr(torch, args.dtype))
    model.generation_config.eos_token_id = None
    tokens = torch.tensor(prompts)

    def write() -> list[list[int]]:
        with torch.inference_mode():
            found = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=args.new,
                pad_token_id=0,
            )
        return found[:, tokens.shape[1] :].tolist()

    return write


def agreement(found: list[list[int]], wanted: list[list[int]]) -> float:
    """Share of tokens before the first difference."""
    same = 0
    for ours, theirs in zip(found, wanted, strict=True):
        pairs = list(zip(ours, theirs, strict=True))
        same += next((at for at, (one, other) in enumerate(pairs) if one != other), len(pairs))
    return same / sum(map(len, wanted))


def table(results: list[dict[str, Any]]) -> None:
    print(" shape batch  transformers     eager  compiled  ratio  compiling same")
    for row in results:
        found = row["tokens_per_second"]
        speeds = [found.get(side, float("nan")) for side in ("transformers", "eager", "compiled")]
        same = row["same_tokens"].get("compiled", row["same_tokens"]["eager"])
        print(
            f"{row['shape']:>6} {row['batch']:>5} {speeds[0]:>11.1f}/s {speeds[1]:>7.1f}/s {speeds[2]:>7.1f}/s "
            f"{row['ratio']:>5.2f}x {row['compile_seconds']:>8.0f} s {same:.2f}"
        )


if __name__ == "__main__":
    main()
