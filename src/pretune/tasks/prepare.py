"""Reads, tokenizes and packs a run's data ahead of training."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pretune.assembly import assemble_tokenizer, cache_folder
from pretune.data.loader import Loader
from pretune.data.shards import prepare
from pretune.guards import EXIT_STOPPED, Interrupts, Stop
from pretune.run_config import RunConfig


def prepare_run(config: RunConfig) -> int:
    """task=prepare: fill the cache with what the run will read, and show how much that is."""
    with Interrupts():
        try:
            tokenizer = assemble_tokenizer(config)
            data = prepare(config.data, tokenizer, cache_folder())
        except Stop:
            print("stopped; what is prepared is kept, run the same command to go on.")
            return EXIT_STOPPED
    table = Table("", "documents", "tokens", "scored", "bytes of text", f"rows of {config.data.sequence_length}")
    for side, tokens in (("train", data.train), ("validation", data.validation)):
        rows = Loader(tokens, config.data, config.seed).num_rows
        figures = (tokens.num_documents, tokens.num_tokens, tokens.num_scored, tokens.num_bytes, rows)
        table.add_row(side, *(f"{figure:,}" for figure in figures))
    Console().print(table)
    print(f"in {data.folder}; train with the same command without task=prepare")
    return 0
