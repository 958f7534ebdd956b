"""Claims: the loader takes under 1% of a training step, and a run over 62M tokens resumes its data in under 1 s.

    python benchmarks/loader_speed.py [--tokens 62000000] [--step-ms 220]

A step has 16 sequences of 256 tokens. --step-ms is the time of such a step on this machine, which follows from
`train/tokens_per_second`. The data set is synthetic, and is opened as in a resume: at its last position.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from pretune.core.config import validate
from pretune.data.config import DataConfig
from pretune.data.loader import Loader
from pretune.data.tokens import Counts, TokenData, shard_folder

ROWS, LENGTH = 16, 256


def main() -> None:
    """Measure each kind of packing; print a line for each, and the claim last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=62_000_000)
    parser.add_argument("--step-ms", type=float, default=220.0)
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        shards = made_up(Path(folder), options.tokens)
        for mode, isolate in (("stream", False), ("stream", True), ("documents", True)):
            # Opening the data for the first time packs whole documents into sequences; a resume is the second time.
            for attempt in ("first", "resume"):
                started = time.perf_counter()
                config = section(mode, isolate)
                data = TokenData(Path(folder), "all", config.source, shards, np.dtype(np.uint16), 0)
                loader = Loader(data, config, seed=1)
                loader.batch(3 * loader.num_sequences - ROWS, ROWS)
                opened = time.perf_counter() - started
                name = f"{mode}{'_isolated' if isolate else ''}"
                results.setdefault(name, {})[f"{attempt}_seconds"] = round(opened, 3)
            started, batches = time.perf_counter(), 300
            for number in range(batches):
                loader.batch(number * ROWS, ROWS)
            batch_ms = (time.perf_counter() - started) / batches * 1e3
            share = batch_ms / options.step_ms
            results[name] |= {"batch_ms": round(batch_ms, 3), "share_of_step": round(share, 5)}
            print(json.dumps({"side": name, **results[name]}))
    slowest = max(result["resume_seconds"] for result in results.values())
    share = max(result["share_of_step"] for result in results.values())
    claim = f"a resume over {options.tokens:,} tokens takes under 1 s, a batch under 1% of a step"
    line = {"claim": claim, "ratio": share / 0.01, "holds": slowest < 1 and share < 0.01, "resume_seconds": slowest}
    print(json.dumps(line | {"share_of_step": share}))


def made_up(folder: Path, num_tokens: int) -> list[Counts]:
    """Shards of random tokens in documents of 20 to 180 tokens, as data preparation would have written them."""
    random, shards = np.random.default_rng(1), []
    for number, start in enumerate(range(0, num_tokens, 1 << 24)):
        size = min(1 << 24, num_tokens - start)
        ends = np.cumsum(random.integers(20, 180, size // 100))
        ends = np.append(ends[ends < size], size)
        path = shard_folder(folder, number)
        path.mkdir()
        random.integers(0, 4096, size, dtype=np.uint16).tofile(path / "all.tokens")
        ends.astype(np.int64).tofile(path / "all.ends")
        shards.append(Counts(tokens=size, documents=len(ends), scored=size, bytes=size))
    return shards


def section(mode: str, isolate: bool) -> DataConfig:
    """A data section with this packing."""
    return validate(
        DataConfig,
        {
            "source": {"kind": "word_problems", "num_problems": 1, "max_number": 20, "seed": 1},
            "validation": {"source": None, "fraction": 0.1, "seed": 1, "group_by": None},
            "format": {"kind": "text", "column": "text", "parse_special": False},
            "tokenizer": {"kind": "inherited", "add_tokens": []},
            "sequence_length": LENGTH,
            "packing": {"mode": mode, "too_long": "split", "isolate": isolate},
            "shuffle": True,
            "mix": {},
            "num_workers": None,
        },
    )


if __name__ == "__main__":
    main()
