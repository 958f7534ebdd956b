"""The steps of a tokenizer.json: what its normalizer, pre-tokenizer, post-processor and decoder consist of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_LISTS = ("normalizers", "pretokenizers", "processors", "decoders")
"""Keys under which a Sequence lists its steps."""


def steps(parts: dict[str, Any], *sections: str) -> Iterator[dict[str, Any]]:
    """The steps of sections of a tokenizer.json, those of a Sequence one by one."""

    def of(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        if part is None:
            return
        if part["type"] != "Sequence":
            yield part
        for key in _LISTS:
            for inner in part.get(key, ()):
                yield from of(inner)

    for section in sections:
        yield from of(parts[section])
