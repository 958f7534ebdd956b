"""Tasks of grids as rows of tokens: what is asked, and whole examples with what is scored in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from pretune.core.batch import IGNORE, Batch
from pretune.data.formats.arc import Arc
from pretune.data.formats.grids import GridTask
from pretune.data.formats.segments import Place
from pretune.data.tokenizer import Tokenizer
from pretune.tasks.evaluate.options import WIDTH


@dataclass(frozen=True)
class Example:
    """The tokens of a document, and whether each is scored."""

    tokens: list[int]
    scored: list[bool]


def examples(tasks: Sequence[GridTask], formatter: Arc, tokenizer: Tokenizer, place: Place) -> list[Example]:
    """Each task's first test with its output, as training has it."""
    found: list[Example] = []
    for task in tasks:
        (document,) = formatter.example(task, place)
        parts = tokenizer.encode_segments(document)
        begin = tokenizer.document_start(parts)
        flags = chain.from_iterable([one.scored] * len(ids) for one, ids in zip(document, parts, strict=True))
        tokens = [*begin, *chain.from_iterable(parts), tokenizer.eos_id]
        found.append(Example(tokens, [*[False] * len(begin), *flags, document[-1].scored]))
    return found


def as_batch(rows: Sequence[Example]) -> Batch:
    """The examples, one in each row, padded on the right to a multiple of WIDTH."""
    longest = max(len(row.tokens) for row in rows) - 1
    inputs = torch.zeros(len(rows), -(-longest // WIDTH) * WIDTH, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORE)
    for number, row in enumerate(rows):
        tokens, scored = torch.tensor(row.tokens), torch.tensor(row.scored)
        inputs[number, : len(tokens) - 1] = tokens[:-1]
        targets[number, : len(tokens) - 1] = tokens[1:].masked_fill(~scored[1:], IGNORE)
    return Batch(inputs, targets, None)
