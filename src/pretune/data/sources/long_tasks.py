"""Tasks whose answer lies far back in a long text: a pass key, one of many keys, an instruction before distractions.

A row has `pieces`, texts in their order: those with a `share` fill the prompt up to `length` tokens, each with that
share of what the others leave; the others are there whole. After them come `question` and `answer`. `depth` says where
what is asked for lies. Sources: the pass key of Landmark Attention (arXiv 2305.16300), the many keys of RULER (arXiv
2404.06654).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from pretune.core.config import InputError
from pretune.data.sources.config import LongTaskSource

VERSION = 1
"""Increment when the same configuration would give other rows."""

CHARACTERS_PER_TOKEN = 8
"""Characters of text for each token to fill: more than tokens have in any language on average."""

Row = dict[str, Any]
Piece = dict[str, Any]


def rows(config: LongTaskSource, texts: Callable[[], Iterator[Row]], name: str) -> Iterator[Row]:
    """`num_examples` examples, determined by the seed and the texts, which `texts` gives from the start again.

    `name`: that of the source of the texts, for messages. Raises InputError if it has none.
    """
    draw, text = random.Random(config.seed), _Stream(texts, config.column, name)
    make = {"passkey": _passkey, "many_keys": _many_keys, "instruction_then_distraction": _instruction}[config.task]
    for _ in range(config.num_examples):
        length = draw.randint(config.min_length, config.max_length)
        depth = draw.uniform(config.min_depth, config.max_depth)
        needles, question, answer = make(draw, config, depth)
        yield {
            "pieces": list(_between(needles, length, text)),
            "needles": [text for _, text in needles],
            "question": question,
            "answer": answer,
            "length": length,
            "depth": depth,
        }


class _Stream:
    """The texts of a source one after the other, and again from the start."""

    def __init__(self, texts: Callable[[], Iterator[Row]], column: str, name: str) -> None:
        self._texts, self._column, self._name = texts, column, name
        self._rows: Iterator[Row] = iter(())
        self._rest = ""

    def take(self, characters: int) -> str:
        """The next `characters`, in which white space is single."""
        found: list[str] = [self._rest]
        missing, begun = characters - len(self._rest), False
        while missing > 0:
            row = next(self._rows, None)
            if row is None:
                if begun:
                    raise InputError(f"{self._name} has no text in its column {self._column} to fill prompts with")
                self._rows, begun = self._texts(), True
                continue
            text = " ".join(str(row.get(self._column) or "").split())
            if text:
                found.append(text)
                missing -= len(text) + 1
                begun = False
        whole = " ".join(one for one in found if one)
        self._rest = whole[characters:].lstrip()
        return whole[:characters]


Needle = tuple[float, str]
"""A depth, and what stands there."""


def _between(needles: list[Needle], length: int, text: _Stream) -> Iterator[Piece]:
    """The needles at their depths, with text between them."""
    ends = [0.0, *(depth for depth, _ in needles), 1.0]
    for place, (begin, end) in enumerate(pairwise(ends)):
        if end > begin:
            characters = round((end - begin) * length * CHARACTERS_PER_TOKEN) + CHARACTERS_PER_TOKEN
            yield {"text": text.take(characters), "share": end - begin}
        if place < len(needles):
            yield {"text": needles[place][1], "share": None}


def _number(draw: random.Random, config: LongTaskSource) -> str:
    return "".join(str(draw.randrange(10)) for _ in range(config.digits))


def _passkey(draw: random.Random, config: LongTaskSource, depth: float) -> tuple[list[Needle], str, str]:
    key = _number(draw, config)
    said = f"\nThe pass key is {key}. Remember it: {key} is the pass key.\n"
    return [(depth, said)], "\nWhat is the pass key? The pass key is", f" {key}"


def _many_keys(draw: random.Random, config: LongTaskSource, depth: float) -> tuple[list[Needle], str, str]:
    names = _names(draw, config.num_keys)
    keys = [_number(draw, config) for _ in names]
    said = [f"\nThe key of {name} is {key}.\n" for name, key in zip(names, keys, strict=True)]
    # The first is asked for; the others are spread evenly.
    others = [(place / (len(said) - 1), one) for place, one in enumerate(said[1:])]
    return (
        sorted([(depth, said[0]), *others]),
        f"\nWhat is the key of {names[0]}? The key of {names[0]} is",
        f" {keys[0]}",
    )


def _names(draw: random.Random, count: int) -> list[str]:
    """Different names of two or three syllables."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(draw.choice(_SYLLABLES) for _ in range(draw.randint(2, 3)))] = None
    return list(names)


_SYLLABLES = ("ba", "do", "fe", "gu", "ka", "li", "mo", "na", "pe", "ri", "so", "tu", "va", "we", "xi", "zo")

_DOINGS: dict[str, Callable[[str], str]] = {
    "write the word {} in capitals": str.upper,
    "write the word {} backwards": lambda word: word[::-1],
    "write the word {} twice, with a space between": lambda word: f"{word} {word}",
    "write the last letter of the word {}": lambda word: word[-1],
    "write the word {} with a hyphen after each letter but the last": "-".join,
}


def _instruction(draw: random.Random, config: LongTaskSource, depth: float) -> tuple[list[Needle], str, str]:
    word, *others = _names(draw, 4)
    doing, *distractions = draw.sample(list(_DOINGS), 4)
    said = f"Instruction: when the text has ended, {doing.format(word)}. Follow no other instruction.\n"
    places = sorted(draw.uniform(depth, 1.0) for _ in distractions)
    later = [
        (place, f"\nInstruction: when the text has ended, {other.format(name)}.\n")
        for place, other, name in zip(places, distractions, others, strict=True)
    ]
    return [(0.0, said), *later], "\nThe text has ended. By the first instruction:", f" {_DOINGS[doing](word)}"
