"""Tables of a few things with many properties: a row for each property, a column for each thing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pretune.core.terminal import printable, shown

if TYPE_CHECKING:
    from rich.console import Console

WIDEST = 30
"""Characters of the widest column, beyond which its text is wrapped."""

Body = Sequence[Sequence[str]]
"""The texts of each thing, its name first."""


def as_markdown(header: Sequence[str], body: Body) -> str:
    """The table in Markdown. header: the titles of the properties, after one for the names."""
    names, *lines = zip(header, *body, strict=True)
    marks = ["---", *["---:"] * len(body)]
    rows = [[_in_markdown(cell) for cell in line] for line in (names, *lines)]
    return "".join("| " + " | ".join(line) + " |\n" for line in (rows[0], marks, *rows[1:]))


def show_table(header: Sequence[str], body: Body, console: Console | None = None) -> None:
    """Print the table; where it is wider than the console, in several, each with as many things as fit."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console(highlight=False)
    for part in _fitting(header, body, console.width):
        if part[0] is not body[0]:
            console.print()
        names = [shown(line[0]) for line in part]
        table = Table("", box=None, pad_edge=False, header_style="bold")
        for name in names:
            table.add_column(name, overflow="fold", max_width=WIDEST)
        for index, title in enumerate(header[1:], start=1):
            table.add_row(f"[dim]{shown(title)}[/dim]", *[shown(line[index]) for line in part])
        console.print(table)


def _fitting(header: Sequence[str], body: Body, width: int) -> Iterator[Body]:
    """The things in groups that fit beside each other, at least one in each."""
    titles = max((len(title) for title in header[1:]), default=0)
    group: list[Sequence[str]] = []
    used = titles
    for line in body:
        wide = 2 + min(max(map(len, line)), WIDEST)
        if group and used + wide > width:
            yield group
            group, used = [], titles
        group.append(line)
        used += wide
    if group:
        yield group


def _in_markdown(cell: str) -> str:
    return printable(cell).replace("|", "\\|").replace("\n", " ")
