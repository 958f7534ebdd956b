"""What ends a generated text: the one definition for samples, task=generate and every export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pretune.core.config import ConfigError, nearest
from pretune.data.formats.build import build_formatter
from pretune.data.formats.formatter import Formatter
from pretune.data.formats.segments import Segment
from pretune.data.tokenizer import Tokenizer
from pretune.run.config import RunConfig


@dataclass(frozen=True)
class Endings:
    """End tokens, which are not part of the text, and stop strings, before whose first occurrence it ends."""

    ids: frozenset[int]
    strings: tuple[str, ...]


def endings(
    tokenizer: Tokenizer, formatter: Formatter, end_tokens: Sequence[str] = (), stop: Sequence[str] = ()
) -> Endings:
    """What ends a text of a run: the end of the document, and all tokens that end one for the model that the tokenizer
    is from; the end of a turn, as the run's chat template writes it (a special token, or else plain text); and
    `end_tokens` and `stop` of a decoding section.

    Raises ConfigError for an end token that the tokenizer does not have.
    """
    ids, strings = {*tokenizer.end_ids}, list(stop)
    for name in end_tokens:
        token = tokenizer.backend.token_to_id(name)
        if token is None:
            known = nearest(name, tokenizer.template_tokens.special) or "; put text that is not a token into stop"
            raise ConfigError(f"end_tokens: the tokenizer has no token '{name}'{known}")
        ids.add(token)
    special = tokenizer.special_tokens
    ids |= {token for token, text in special.items() if text in strings}
    if formatter.end_of_turn:
        written = tokenizer.encode_segments([Segment(formatter.end_of_turn, True, True)])[0]
        if len(written) > 0 and (written[0] in special or len(written) == 1):
            ids.add(written[0])
        else:
            strings.append(formatter.end_of_turn)
    return Endings(frozenset(ids), tuple(strings))


def run_endings(config: RunConfig, tokenizer: Tokenizer) -> Endings:
    """What ends a run's texts wherever they are generated: for exports. Stop strings of one task are left out."""
    formatter = build_formatter(config.data.format, tokenizer.template_tokens)
    return endings(tokenizer, formatter, config.generate.end_tokens)
