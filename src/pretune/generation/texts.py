"""Generate texts from prompts, streamed or whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pretune.generation.beams import beam_search
from pretune.generation.config import DecodingConfig
from pretune.generation.decode import Decoder, Decoding
from pretune.generation.writer import Writer

Reason = Literal["end", "stop", "length"]
"""Why a text ended: an end token, a stop string, or the length limit."""


class Decodes(Protocol):
    """Interface for turning ids into text; a Tokenizer has it."""

    @property
    def special_tokens(self) -> Mapping[int, str]:
        """The text of each special token, which `decode` leaves out, by id."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        ...


@dataclass(frozen=True)
class Piece:
    """A new piece of a text: its place in the list of prompts, new characters, number of tokens so far, and, for the
    last piece, why the text ended."""

    place: int
    text: str
    num_tokens: int
    reason: Reason | None


@dataclass(frozen=True)
class Text:
    """A generated text without the end token or stop string that ended it, and its number of tokens."""

    text: str
    num_tokens: int
    reason: Reason


def stream(
    decoder: Decoder,
    tokenizer: Decodes,
    prompts: Sequence[Sequence[int]],
    config: DecodingConfig,
    numbers: Sequence[int] | None = None,
) -> Iterator[Piece]:
    """Stream the texts for one batch of nonempty prompts; the last piece of each text says why it ended.

    Raises InputError for a prompt that leaves no room for a new token. With beam search, texts come only at the end.
    """
    if not prompts:
        return
    if config.num_beams > 1:
        yield from _best_of_beams(decoder, tokenizer, prompts, config)
        return
    decoding = Decoding(decoder, prompts, config, numbers)
    writers = [Writer(tokenizer.decode, config.stop, prompt, tokenizer.special_tokens) for prompt in prompts]
    while decoding.under_way:
        last = set()
        for text, token in decoding.next_tokens().items():
            writer, reason = writers[text], decoding.ended(text)
            shown = "" if reason == "end" else writer.add(token)
            if reason is not None:
                shown += writer.finish()
            why: Reason | None = "stop" if writer.stopped else reason
            if why is not None:
                last.add(text)
            if shown or why:
                yield Piece(text, shown, len(decoding.written[text]) - (reason == "end"), why)
        decoding.drop(last)


def in_batches(
    decoder: Decoder, tokenizer: Decodes, prompts: Sequence[Sequence[int]], config: DecodingConfig, rows: int
) -> Iterator[tuple[int, Text]]:
    """Each text with its prompt's place in the list, as soon as the text is complete.

    Prompts of similar length share a batch. Random numbers depend on a text's place in the list, not on its batch.
    """
    by_length = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    decoder.room(prompts, config)  # raises for a prompt that is too long before anything is generated
    for start in range(0, len(prompts), rows):
        places = by_length[start : start + rows]
        written = ["" for _ in places]
        for piece in stream(decoder, tokenizer, [prompts[place] for place in places], config, numbers=places):
            written[piece.place] += piece.text
            if piece.reason is not None:
                yield places[piece.place], Text(written[piece.place], piece.num_tokens, piece.reason)


def _best_of_beams(
    decoder: Decoder, tokenizer: Decodes, prompts: Sequence[Sequence[int]], config: DecodingConfig
) -> Iterator[Piece]:
    for place, tokens in enumerate(beam_search(decoder, prompts, config)):
        ended = tokens[-1] in decoder.vocabulary.end_ids
        kept = tokens[:-1] if ended else tokens
        writer = Writer(tokenizer.decode, (), prompts[place])
        text = "".join([*map(writer.add, kept), writer.finish()])
        yield Piece(place, text, len(kept), "end" if ended else "length")
