"""task=prepare: read, tokenize and pack a run's data before training."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from pretune.core.terminal import say, shown
from pretune.data.config import DataConfig
from pretune.data.formats.config import PromptCompletionFormat, TextFormat
from pretune.data.loader import Loader
from pretune.data.shards import Prepared, prepare
from pretune.run.config import RunConfig
from pretune.run.folder import cache_folder
from pretune.run.tokenizer import assemble_tokenizer, notes_on_template
from pretune.tasks.prepare.show import ESCAPE, show_documents
from pretune.training.signals import stoppable


def prepare_run(config: RunConfig) -> int:
    """task=prepare: fill the cache with the run's data, and show its size and some documents."""
    stopped = "stopped; prepared data is kept, run the same command to resume."
    return stoppable(lambda _: _prepare_run(config), stopped)


def _prepare_run(config: RunConfig) -> int:
    tokenizer = assemble_tokenizer(config)
    data = prepare(config.data, tokenizer, cache_folder())
    console = Console()
    sets = [("", config.data, data)]
    sets += [(f"{name} ", config.data.part(name), part) for name, part in data.parts.items()]
    for name, section, part in sets:
        console.print(_table(name, section, part, config.seed))
        for side, tokens in (("train", part.train), ("validation", part.validation)):
            for reason in tokens.left_out():
                say(f"left out of {name}{side}: {reason}")
        for note in _notes(name, section, part):
            say(note)
    for note in (*data.notes, *notes_on_template(config, tokenizer)):
        say(note)
    for name, section, part in sets:
        show_documents(console, f"{name}document", part.train, tokenizer, config.prepare.show, section.sequence_length)
    say(f"in {data.folder}; train with the same command without task=prepare")
    return 0


def _notes(name: str, section: DataConfig, data: Prepared) -> Iterator[str]:
    """What the rows have that does not reach the model as it stands there."""
    sides = (("train", data.train), ("validation", data.validation))
    if unread := sorted({column for _, side in sides for column in side.unread}):
        yield f"columns of {name or 'data '}that data.format does not read: {', '.join(unread)}"
    can_parse = isinstance(section.format, TextFormat | PromptCompletionFormat)
    advice = "; data.format.parse_special=true makes them special tokens" if can_parse else ""
    for side, tokens in sides:
        if found := tokens.spelled_out():
            yield f"{name}{side} texts spell special tokens, which stay text (shown after a {ESCAPE}): {found}{advice}"


def _table(name: str, section: DataConfig, data: Prepared, seed: int) -> Table:
    """The size of a data set, by side."""
    table = Table("", shown(f"{name}train"), shown(f"{name}validation"))
    sides = (data.train, data.validation)
    loaders = [Loader(side, section, seed) for side in sides]
    reports = [loader.report for loader in loaders]

    def row(title: str, *values: int) -> None:
        table.add_row(title, *(f"{value:,}" for value in values))

    row("documents", *(side.num_documents for side in sides))
    row("tokens", *(side.num_tokens for side in sides))
    row("scored tokens", *(side.num_scored for side in sides))
    row("bytes of text", *(side.num_bytes for side in sides))
    row("rows left out", *(side.skipped.total() for side in sides))
    row(f"sequences of {section.sequence_length} tokens", *(loader.num_sequences for loader in loaders))
    row("padding in them", *(report["padding"] for report in reports))
    if section.packing.mode != "stream":
        done = {"cut": "cut", "split": "split", "drop": "dropped"}[section.packing.too_long]
        row(f"longer than a row: {done}", *(report["too_long"] for report in reports))
        row("tokens lost by that", *(report["lost_tokens"] for report in reports))
    return table
