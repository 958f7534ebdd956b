"""Special tokens that data.tokenizer.add_tokens appends to a tokenizer: those that it lists, or a chat template's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pretune.core.config import ConfigError, InputError
from pretune.data.config import AddTokens, DataConfig
from pretune.data.formats.special_tokens import TemplateTokens
from pretune.data.formats.template_source import written_tokens

if TYPE_CHECKING:
    import tokenizers


def tokens_to_add(asked: AddTokens, data: DataConfig, tokens: TemplateTokens, known: Sequence[str]) -> tuple[str, ...]:
    """The texts of the tokens to append; `tokens`: what the tokenizer offers a chat template, `known`: the texts of its
    tokens.

    Raises what template_source raises.
    """
    return tuple(lacking_tokens(data, tokens, known)) if asked == "template" else asked


def lacking_tokens(data: DataConfig, tokens: TemplateTokens, known: Sequence[str]) -> Iterator[str]:
    """The special tokens, each once, that the chat templates of `data` write and that are not `known`."""
    written = [one for chat in data.chats for one in written_tokens(chat, tokens)]
    there = {*known}
    return (one for one in dict.fromkeys(written) if one not in there)


def append_tokens(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> tuple[int, ...]:
    """Append special tokens, with the ids after the last; return these.

    Raises ConfigError for a token that is there already, InputError for a tokenizer whose next id is another token's.
    """
    from tokenizers import AddedToken

    first = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    for index, text in enumerate(texts, start=first):
        there = backend.token_to_id(text)
        if there is not None:
            raise ConfigError(
                f"data.tokenizer.add_tokens: the tokenizer has '{text}' already, as token {there}; leave it out"
            )
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        if backend.token_to_id(text) != index:
            raise InputError(
                f"data.tokenizer.add_tokens: '{text}' would become token {backend.token_to_id(text)}, not {index}: the "
                "ids of this tokenizer have gaps, so tokens cannot be appended; use another data.tokenizer"
            )
    return tuple(range(first, first + len(texts)))
