"""Cut long texts for the tokenizer, which needs about a hundred bytes of memory for each character that it is given.

A cut is made only where tokens do not depend on the other side: between a word and the space after it, after a line,
or between any two characters, whichever the tokenizer confirms on the text around the cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

PIECE_CHARACTERS = 1 << 20
"""Longer texts are cut into pieces of about this length."""

_AROUND = 200
"""Characters on both sides of a cut that the tokenizer is asked about: more than any token has."""
_TRIES = 50
"""Places tried near the end of a piece."""

Encode = Callable[[list[str]], list[list[int]]]


def cut(text: str, encode: Encode, length: int = PIECE_CHARACTERS) -> list[str]:
    """The pieces of a text, most of them of at most `length` characters.

    `encode` must put no space before a text. Where it confirms no place, a piece is longer.
    """
    pieces: list[str] = []
    begin = 0
    while len(text) - begin > length:
        places = _places(text, begin, begin + length)
        at = next((at for at in places if _is_apart(text, at, encode)), None)
        if at is None:
            length *= 2
            continue
        pieces.append(text[begin:at])
        begin = at
    return [*pieces, text[begin:]]


def groups(numbers: Iterable[int], lengths: Sequence[int], total: int = PIECE_CHARACTERS) -> Iterator[list[int]]:
    """The numbers in groups whose texts, of `lengths` characters, have about `total` characters together."""
    group: list[int] = []
    size = 0
    for number in numbers:
        group.append(number)
        size += lengths[number]
        if size >= total:
            yield group
            group, size = [], 0
    if group:
        yield group


def _is_apart(text: str, at: int, encode: Encode) -> bool:
    """Whether the tokens around a place are those of its two sides."""
    before, after = text[max(0, at - _AROUND) : at], text[at : at + _AROUND]
    whole, first, second = encode([before + after, before, after])
    return whole == first + second


def _places(text: str, begin: int, end: int) -> Iterator[int]:
    """Where to try to cut between `begin` and `end`, the likeliest and last ones first."""
    spaces = (at for at in range(end, begin + 1, -1) if text[at] == " " and text[at - 1].isalnum())
    lines = (at for at in range(end, begin + 1, -1) if text[at - 1] == "\n" and text[at] != "\n")
    yield from islice(spaces, _TRIES)
    yield from islice(lines, _TRIES)
    yield from range(end, max(begin, end - _TRIES), -1)
