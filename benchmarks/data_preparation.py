"""Claim: preparing data is at least 0.9 times as fast as `tokenizers`' own encode_batch on the same texts.

    python benchmarks/data_preparation.py [--files 'texts/*.jsonl.xz'] [--tokenizer tokenizer.json] [--rounds 3]

Our side reads the files, formats, tokenizes and writes complete shards to disk. The other side only tokenizes texts
that are already in memory, on all cores. Without --files the texts are this machine's own Python documentation, written
to a file. The sides take turns; figures are median tokens per second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from pretune.core.config import validate
from pretune.data.config import DataConfig
from pretune.data.formats.build import build_formatter
from pretune.data.formats.documents import training_texts
from pretune.data.shards import prepare
from pretune.data.tokenizer import Tokenizer, load_tokenizer


def main() -> None:
    """Prepare and encode in turn; print a line for each, and the claim last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="*")
    parser.add_argument("--tokenizer")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    config = validate(DataConfig, section(options.files, options.tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(config.tokenizer, config, Path(folder))
        texts = list(training_texts(config, build_formatter(config.format, tokenizer.template_tokens)))
        if options.files is None:  # collecting the documentation takes longer than the measured part
            written = Path(folder) / "documentation.jsonl"
            written.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            config = validate(DataConfig, section([str(written)], options.tokenizer))
        rates: dict[str, list[float]] = {"prepare": [], "encode_batch": []}
        for number in range(options.rounds):
            rates["prepare"].append(prepared(config, tokenizer, Path(folder) / str(number)))
            rates["encode_batch"].append(encoded(tokenizer, texts))
    medians = {side: round(statistics.median(values)) for side, values in rates.items()}
    for side, values in rates.items():
        print(json.dumps({"side": side, "tokens_per_second": medians[side], "rounds": [round(v) for v in values]}))
    ratio = round(medians["prepare"] / medians["encode_batch"], 3)
    claim = "preparation is at least 0.9 times as fast as encode_batch"
    size = sum(len(text.encode()) for text in texts)
    print(json.dumps({"claim": claim, "ratio": ratio, "holds": ratio >= 0.9, "bytes": size, **medians}))


def section(files: list[str] | None, tokenizer: str | None) -> dict[str, Any]:
    """The data section that reads `files`, or this machine's Python documentation."""
    docs = {"kind": "python_docs", "packages": None, "max_bytes": 20_000_000}
    source = {"kind": "files", "files": files, "format": "auto", "max_rows": None} if files else docs
    trained = {"kind": "trained", "vocab_size": 8192, "max_bytes": 8_000_000, "split_digits": False, "add_tokens": []}
    return {
        "source": source,
        # Rows are held out by their content: what one seed has left for training, it holds out nothing of.
        "validation": {"source": None, "fraction": 0.01, "seed": 2 if files else 1, "group_by": None},
        "format": {"kind": "text", "column": "text", "parse_special": False},
        "tokenizer": {"kind": "file", "path": tokenizer, "eos": "<|endoftext|>", "add_tokens": []}
        if tokenizer
        else trained,
        "sequence_length": 512,
        "packing": {"mode": "stream", "too_long": "split", "isolate": False},
        "shuffle": True,
        "mix": {},
        "num_workers": None,
    }


def prepared(config: DataConfig, tokenizer: Tokenizer, cache: Path) -> float:
    """Tokens per second of a complete preparation, from files to shards."""
    started = time.perf_counter()
    data = prepare(config, tokenizer, cache)
    return (data.train.num_tokens + data.validation.num_tokens) / (time.perf_counter() - started)


def encoded(tokenizer: Tokenizer, texts: list[str]) -> float:
    """Tokens per second of encode_batch alone, a thousand texts at a time."""
    tokens, started = 0, time.perf_counter()
    for start in range(0, len(texts), 1000):
        tokens += sum(len(encoding) for encoding in tokenizer.backend.encode_batch(texts[start : start + 1000]))
    return tokens / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
