"""The table of models: what each property is called, and how people read it."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pretune.core.units import duration, memory, short
from pretune.memory.ways import WAYS, Way
from pretune.tasks.inspect.facts import Facts, best_text
from pretune.tasks.inspect.memory import Machine, Needs


@dataclass(frozen=True)
class Row:
    """A model that could be read."""

    facts: Facts
    needs: Needs | None
    """None for a model that nothing here builds."""


@dataclass(frozen=True)
class Column:
    """A property: its title, its value or None, how people read it, and its standard error if it has one."""

    title: str
    of: Callable[[Any], Any]
    show: Callable[[Any], str] = str
    error: Callable[[Any], float | None] = lambda row: None

    def text(self, row: Any) -> str:
        value, error = self.of(row), self.error(row)
        return "" if value is None else self.show(value) + ("" if error is None else f" ± {self.show(error)}")


def columns(machine: Machine) -> list[Column]:
    """Every property, in the order of the table."""
    return [
        Column("model", lambda row: row.facts.name),
        Column("is a", lambda row: row.facts.kind),
        Column("architecture", lambda row: row.facts.shape.architecture),
        Column("parameters", lambda row: row.facts.shape.parameters, short),
        Column("without embeddings", lambda row: row.facts.shape.without_embeddings, short),
        Column("layers", lambda row: row.facts.shape.layers),
        Column("width", lambda row: row.facts.shape.dim, "{:,}".format),
        Column("vocabulary", lambda row: row.facts.shape.vocabulary, "{:,}".format),
        Column("context", lambda row: row.facts.shape.context, "{:,}".format),
        Column("RoPE theta", lambda row: row.facts.shape.theta, "{:,.0f}".format),
        Column("in windows", lambda row: row.facts.shape.local_theta, "{:,.0f}".format),
        Column("RoPE scaling", lambda row: row.facts.shape.scaling),
        Column("heads", lambda row: row.facts.shape.heads),
        Column("KV heads", lambda row: row.facts.shape.kv_heads),
        Column("tensor-parallel sizes", lambda row: _list(row.facts.shape.tensor_parallel)),
        Column("dtype", lambda row: row.facts.dtype),
        Column("licence", lambda row: row.facts.licence),
        Column("chat template", lambda row: row.facts.chat_template, lambda there: "yes" if there else "no"),
        Column("special tokens", lambda row: _tokens(row.facts.special_tokens)),
        Column("trained by", lambda row: trained_by(row.facts)),
        Column("memory: tokens", lambda row: row.needs and row.needs.context, "{:,}".format),
        *(_memory(way, machine.usable) for way in WAYS),
        Column("stage", lambda row: row.facts.run and row.facts.run.stage),
        Column("step", lambda row: row.facts.run and row.facts.run.step, "{:,}".format),
        Column("complete", lambda row: row.facts.run and row.facts.run.complete, lambda done: "yes" if done else "no"),
        Column("best", lambda row: (row.facts.run and best_text(row.facts.run)) or None),
        Column("last written", lambda row: row.facts.run and row.facts.run.age, lambda age: f"{duration(age)} ago"),
        Column("on disk", lambda row: row.facts.run and row.facts.run.size, memory),
    ]


WAY_NAMES: dict[Way, str] = {
    "full": "full fine-tuning",
    "LoRA": "LoRA",
    "QLoRA": "QLoRA",
    "generation": "generation",
}


def _memory(way: Way, usable: int) -> Column:
    def shown(size: int) -> str:
        return memory(size) if size <= usable else f"{memory(size)}, too much"

    return Column(f"memory: {WAY_NAMES[way]}", lambda row: row.needs and row.needs.by_way[way], shown)


def trained_by(facts: Facts) -> str:
    """What trains the model here, and why not Pretune's own transformer."""
    if facts.misfit is None:
        return "Pretune's transformer"
    if facts.nobody is None:
        return f"model=transformers ({facts.misfit})"
    return f"nothing here ({facts.nobody})"


def _list(sizes: Sequence[int]) -> str | None:
    return ", ".join(map(str, sizes)) or None


def _tokens(special: Mapping[str, str]) -> str | None:
    return ", ".join(f"{role} {text}" for role, text in special.items()) or None


def texts(wanted: Sequence[Column], rows: Sequence[Any]) -> tuple[list[str], list[list[str]]]:
    """The titles of the columns in which any row has a value, and the texts of each row."""
    filled = [column for column in wanted if any(column.of(row) is not None for row in rows)]
    return [column.title for column in filled], [[column.text(row) for column in filled] for row in rows]


def as_csv(wanted: Sequence[Column], rows: Sequence[Any], errors: Mapping[str, str]) -> str:
    """A line per model with full-precision values, bytes and seconds; `error` says why one could not be read."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(column.title for column in wanted), "error"])
    for row in rows:
        writer.writerow([*(column.of(row) for column in wanted), None])
    for name, error in errors.items():
        writer.writerow([name, *[None] * (len(wanted) - 1), error])
    return text.getvalue()
