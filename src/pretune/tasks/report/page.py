"""A self-contained HTML page about runs: figure, table, configuration and samples."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

_MAX_SAMPLES = 20

_CSS = """
:root { --ink: #1e293b; --soft: #64748b; --line: #e2e8f0; --ground: #f8fafc; --card: #fff; --accent: #2563eb }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e2e8f0; --soft: #94a3b8; --line: #334155; --ground: #0f172a; --card: #1e293b; --accent: #93c5fd }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 2.5rem 1.5rem; color: var(--ink); background: var(--ground);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 1.5rem; margin: 0 0 1.5rem } h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem }
h2 small { color: var(--soft); font-weight: normal }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 1rem 0; overflow-x: auto }
.card img { display: block; width: 100%; background: #fff; padding: .75rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .45rem 1rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
tr:last-child > * { border-bottom: 0 } th:first-child { text-align: left; font-weight: normal; color: var(--soft) }
thead th { color: var(--ink); font-weight: 600 }
details { border-bottom: 1px solid var(--line) } details:last-child { border-bottom: 0 }
summary { cursor: pointer; padding: .6rem 1rem; color: var(--accent) }
pre { margin: 0; padding: 0 1rem 1rem; font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere }
.sample { margin: 0 1rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere }
.sample small { display: block; color: var(--soft) } .sample b { color: var(--accent) }
"""


@dataclass(frozen=True)
class Section:
    """What the page shows of one run beside its metrics."""

    name: str
    stage: str
    config: str
    samples: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class Picture:
    """A PNG, and what it shows."""

    png: bytes
    shows: str


Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""The titles of properties, and the texts of each thing that has them."""


def page(pictures: Sequence[Picture], tables: Sequence[Table], sections: Sequence[Section]) -> str:
    """The whole page, on which the first picture comes before the tables and the others after them."""
    drawn = [_picture(picture) for picture in pictures]
    title = escape(", ".join(section.name for section in sections))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        + "".join(drawn[:1])
        + "".join(f'<div class="card">{_table(header, body)}</div>\n' for header, body in tables)
        + "".join(drawn[1:])
        + "".join(_section(section) for section in sections)
        + "</body>\n</html>\n"
    )


def _picture(picture: Picture) -> str:
    image = base64.b64encode(picture.png).decode()
    shown = f'<img alt="{escape(picture.shows)}" src="data:image/png;base64,{image}">'
    return f'<div class="card">{shown}</div>\n'


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Transposed: a row for each metric, a column for each run."""
    head = "".join(f"<th>{escape(line[0])}</th>" for line in body)
    rows = "".join(
        f"<tr><th>{escape(title)}</th>" + "".join(f"<td>{escape(line[index])}</td>" for line in body) + "</tr>\n"
        for index, title in enumerate(header[1:], start=1)
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>\n{rows}</tbody></table>"


def _section(section: Section) -> str:
    parts = []
    if section.samples:
        shown = "".join(_sample(sample) for sample in reversed(section.samples[-_MAX_SAMPLES:]))
        parts.append(f"<details open><summary>Samples, newest first</summary>{shown}</details>")
    if section.config:
        parts.append(f"<details><summary>Configuration</summary><pre>{escape(section.config)}</pre></details>")
    if section.summary:
        text = escape(json.dumps(section.summary, indent=2))
        parts.append(f"<details><summary>Final metrics, versions and device</summary><pre>{text}</pre></details>")
    return (
        f"<h2>{escape(section.name)} <small>{escape(section.stage)}</small></h2>\n"
        f'<div class="card">{"".join(parts)}</div>\n'
        if parts
        else ""
    )


def _sample(sample: Mapping[str, Any]) -> str:
    step, prompt, text = (escape(str(sample.get(key, ""))) for key in ("step", "prompt", "text"))
    return f'<div class="sample"><small>step {step}</small><b>{prompt}</b>{text}</div>'
