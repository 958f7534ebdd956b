"""Special tokens as a chat template and the formats know them: by their texts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class TemplateTokens:
    """A tokenizer's chat template, or None, and the texts of its special tokens."""

    template: str | None
    bos: str
    eos: str
    special: tuple[str, ...]
    others: tuple[str, ...] = ()
    """The texts of added tokens that are not special."""
    template_from: str | None = None
    """The data.format.template that named the place of `template`; None for the tokenizer's own, or for Jinja text."""

    def has(self, text: str) -> bool:
        """Whether this text, from a template, becomes a token of its own."""
        return text in self.special or text in self.others or text == self.eos


@lru_cache(maxsize=8)
def spellings(tokens: TemplateTokens) -> re.Pattern[str]:
    """Matches text that spells a special token, the longest one where several begin."""
    longest_first = sorted({*tokens.special, tokens.eos}, key=len, reverse=True)
    return re.compile("|".join(re.escape(token) for token in longest_first))


def without_eos(text: str, tokens: TemplateTokens) -> str:
    """The text without an end-of-document token at its end, which encoding adds, and without white space after it."""
    return text.rstrip().removesuffix(tokens.eos) if text.rstrip().endswith(tokens.eos) else text
