"""Conversations written out by a chat template, with the assistant's turns found in what it writes.

The template is a program that nobody here wrote, so its words are taken for it: a turn of the assistant is what the
conversation up to and with it has more than the prompt before it, and every such beginning must be found again in the
whole. What a model is asked at generation is the same prompt, written by the same call.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pretune.core.config import ConfigError, InputError
from pretune.data.formats.config import ChatFormat
from pretune.data.formats.conversations import Message
from pretune.data.formats.segments import Place, Segment, Unusable

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
"""Around what spells a special token in a message: characters that Unicode keeps out of texts."""

_QUESTION, _ANSWER = "What is the colour of the sea", "Blue on most days"
_PROBE: list[Message] = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]


@dataclass(frozen=True)
class TemplateTokens:
    """What a tokenizer brings to a chat template: its own template or None, and the texts of its special tokens."""

    template: str | None
    bos: str
    eos: str
    special: tuple[str, ...]


class ChatTemplate:
    """A chat template, with the tokens of a tokenizer.

    `end_of_turn` is the text that it puts after a turn of the assistant, without white space: where generation stops.
    Raises ConfigError for a template that is missing, is not valid Jinja, or has no place for the user's or the
    assistant's text.
    """

    def __init__(self, config: ChatFormat, tokens: TemplateTokens) -> None:
        text = tokens.template if config.template is None else config.template
        if text is None:
            raise ConfigError(
                "data.format.kind = chat needs a chat template, and the tokenizer has none; set data.format.template, "
                "for instance with data/format=chat_plain"
            )
        self._text, self._eos, self._turns = text, tokens.eos, config.assistant_turns
        self._variables = {**config.variables, "bos_token": tokens.bos, "eos_token": tokens.eos}
        longest_first = sorted({*tokens.special, tokens.eos}, key=len, reverse=True)
        self._special = re.compile("|".join(re.escape(token) for token in longest_first))
        self._asks = True
        self.end_of_turn: str = self._try_out()

    def prompt(self, messages: Sequence[Message]) -> list[Segment]:
        """What the model is given to write the next turn of the assistant.

        Raises InputError where the template refuses the chat.
        """
        marked = self._marked(messages)
        try:
            text = self._prompt(marked)
            # Cut where training cuts, so that the earlier turns have the tokens that they had there.
            earlier = _ends_of_turns(marked) if self._turns == "together" else []
            spans = [self._span(marked[:end], None, None) for end in earlier]
        except _Refusal as refusal:
            raise InputError(f"the chat template refuses this chat: {refusal}") from None
        return _segments(text, [Span(span.start, span.stop, False) for span, turn in spans if text.startswith(turn)])

    def documents(self, messages: Sequence[Message], place: Place) -> list[list[Segment]]:
        """The documents of a conversation that ends with the assistant, without the end-of-document token.

        Raises Unusable where the template refuses the conversation, InputError where it writes a turn otherwise once
        others follow, or writes it otherwise than its own prompt begins it.
        """
        marked = self._marked(messages)
        ends = _ends_of_turns(marked)
        if self._turns == "together":
            return [self._document(marked, ends, place)]
        ends = ends if self._turns == "apart" else ends[-1:]
        return [self._document(marked[:end], [end], place) for end in ends]

    def _document(self, messages: list[Message], ends: list[int], place: Place) -> list[Segment]:
        """The conversation with the turns that end at `ends` (counts of messages) scored."""
        try:
            whole = self._render(messages)
            spans = [self._span(messages[:end], whole if end == len(messages) else None, place) for end in ends]
        except _Refusal as refusal:
            raise Unusable(f"its chat template refuses it: {refusal}") from None
        except ConfigError as error:
            raise InputError(f"{place}: {error}") from None
        for (span, turn), end in zip(spans, ends, strict=True):
            if not whole.startswith(turn) or span.start >= span.stop:
                raise InputError(
                    f"{place}: the chat template writes message {end} otherwise once others follow, so what is scored "
                    "would not be what the model is asked for; set data.format.assistant_turns=apart (a document for "
                    "each turn) or last"
                )
        # What follows the last turn is the end of the document, which is no part of the text.
        whole = whole.rstrip().removesuffix(self._eos)
        return _segments(whole, [Span(span.start, min(span.stop, len(whole)), True) for span, _ in spans])

    def _span(self, messages: list[Message], written: str | None, place: Place | None) -> tuple[Span, str]:
        """Where the last turn begins and ends in what the template writes of `messages`, and that text.

        White space after the turn is no part of it: by then, generation has stopped.
        """
        turn = self._render(messages) if written is None else written
        prompt = self._prompt(messages[:-1])
        if not turn.startswith(prompt):
            raise InputError(
                f"{place or 'the chat'}: the chat template's prompt for message {len(messages)} is not how it begins "
                f"that message (the prompt ends in {prompt[-40:]!r}); choose another template, or set "
                "data.format.variables"
            )
        return Span(len(prompt), len(turn.rstrip()), True), turn

    def _prompt(self, messages: list[Message]) -> str:
        """The text up to the assistant's next turn; a space at its end belongs to the turn."""
        if self._asks:
            return self._render(messages, add_generation_prompt=True).rstrip(" ")
        written = self._render([*messages, _PROBE[1]])
        return written[: written.rindex(_ANSWER)].rstrip(" ")

    def _render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            (written,), _ = render_jinja_template(
                [messages],
                chat_template=self._text,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from None
        except Exception as error:
            if type(error) is jinja2.TemplateError:  # what a template's own raise_exception(...) raises
                raise _Refusal(error.message) from None
            raise ConfigError(f"the chat template fails: {type(error).__name__}: {error}") from None
        return written

    def _try_out(self) -> str:
        """See that a question and its answer come out of the template; the text that ends the answer's turn."""
        try:
            asked = self._render(_PROBE[:1], add_generation_prompt=True)
            self._asks = asked != self._render(_PROBE[:1])
            whole = self._render(_PROBE)
        except _Refusal as refusal:
            raise ConfigError(f"the chat template refuses a question and its answer: {refusal}") from None
        for role, text in (("user", _QUESTION), ("assistant", _ANSWER)):
            if text not in whole:
                raise ConfigError(
                    f"the chat template has no place for the {role}'s text; write message['content'] there"
                )
        return whole[whole.rindex(_ANSWER) + len(_ANSWER) :].strip()

    def _marked(self, messages: Iterable[Message]) -> list[Message]:
        """The messages with a mark around whatever spells a special token."""

        def mark(value: Any) -> Any:
            if isinstance(value, str):
                plain = value.replace(_OPEN, "").replace(_CLOSE, "")
                return self._special.sub(lambda found: f"{_OPEN}{found[0]}{_CLOSE}", plain)
            if isinstance(value, dict):
                return {key: mark(inner) for key, inner in value.items()}
            return [mark(inner) for inner in value] if isinstance(value, list | tuple) else value

        return [mark(message) for message in messages]


class Span(NamedTuple):
    """A stretch of text from `start` to `stop` (exclusive)."""

    start: int
    stop: int
    scored: bool


def _ends_of_turns(messages: list[Message]) -> list[int]:
    """How many messages the conversation has at the end of each of the assistant's turns."""
    return [number for number, message in enumerate(messages, start=1) if message["role"] == "assistant"]


def _segments(text: str, spans: list[Span]) -> list[Segment]:
    """The text in stretches: `spans` and what is between them, and what messages spell apart from the template's."""
    segments: list[Segment] = []
    at = 0
    for span in [*spans, Span(len(text), len(text), False)]:
        for begin, end, scored in ((at, span.start, False), span):
            pieces = _MARKS.split(text[begin:end])
            segments += [Segment(piece, scored, number % 2 == 0) for number, piece in enumerate(pieces) if piece]
        at = span.stop
    return segments


_MARKS = re.compile(f"{_OPEN}(.*?){_CLOSE}|[{_OPEN}{_CLOSE}]", re.DOTALL)


class _Refusal(Exception):
    """A template's own words on why it does not write a conversation."""
