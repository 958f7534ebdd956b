"""Render conversations with a chat template, and locate the assistant's turns in the result.

A template is an arbitrary program, so turns are found by rendering prefixes of the conversation: an assistant turn is
what rendering up to and including it adds to the rendered prompt before it. Every such prefix must also be a prefix of
the whole rendered conversation. Generation uses the same prompt, rendered by the same call.
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
"""Mark text in a message that spells a special token; these are Unicode noncharacters, which do not occur in text."""

_QUESTION, _ANSWER = "What is the colour of the sea", "Blue on most days"
_PROBE: list[Message] = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]


@dataclass(frozen=True)
class TemplateTokens:
    """A tokenizer's chat template, or None, and the texts of its special tokens."""

    template: str | None
    bos: str
    eos: str
    special: tuple[str, ...]


class ChatTemplate:
    """A chat template with a tokenizer's special tokens.

    `end_of_turn` is the text that it writes after an assistant turn, without white space: generation stops there.
    Raises ConfigError for a template that is missing, is not valid Jinja, or does not render the user's or the
    assistant's text.
    """

    def __init__(self, config: ChatFormat, tokens: TemplateTokens) -> None:
        text = tokens.template if config.template is None else config.template
        if text is None:
            raise ConfigError(
                "data.format.kind = chat needs a chat template, but the tokenizer has none; set data.format.template, "
                "for instance with data/format=chat_plain"
            )
        self._text, self._eos, self._turns = text, tokens.eos, config.assistant_turns
        self._variables = {**config.variables, "bos_token": tokens.bos, "eos_token": tokens.eos}
        longest_first = sorted({*tokens.special, tokens.eos}, key=len, reverse=True)
        self._special = re.compile("|".join(re.escape(token) for token in longest_first))
        self._asks = True
        self.end_of_turn: str = self._try_out()

    def prompt(self, messages: Sequence[Message]) -> list[Segment]:
        """The prompt for the assistant's next turn.

        Raises InputError if the template rejects the chat.
        """
        marked = self._marked(messages)
        try:
            text = self._prompt(marked)
            # Split into segments where training does, so that earlier turns get the same tokens as in training.
            earlier = _ends_of_turns(marked) if self._turns == "together" else []
            spans = [self._span(marked[:end], None, None) for end in earlier]
        except _Refusal as refusal:
            raise InputError(f"the chat template rejects this chat: {refusal}") from None
        return _segments(text, [Span(span.start, span.stop, False) for span, turn in spans if text.startswith(turn)])

    def documents(self, messages: Sequence[Message], place: Place) -> list[list[Segment]]:
        """The documents of a conversation that ends with the assistant, without the end-of-document token.

        Raises Unusable if the template rejects the conversation; InputError if it renders a turn differently when more
        turns follow, or if its prompt is not a prefix of the rendered turn.
        """
        marked = self._marked(messages)
        ends = _ends_of_turns(marked)
        if self._turns == "together":
            return [self._document(marked, ends, place)]
        ends = ends if self._turns == "apart" else ends[-1:]
        return [self._document(marked[:end], [end], place) for end in ends]

    def _document(self, messages: list[Message], ends: list[int], place: Place) -> list[Segment]:
        """The conversation as segments; the turns that end after `ends` messages are scored."""
        try:
            whole = self._render(messages)
            spans = [self._span(messages[:end], whole if end == len(messages) else None, place) for end in ends]
        except _Refusal as refusal:
            raise Unusable(f"the chat template rejects it: {refusal}") from None
        except ConfigError as error:
            raise InputError(f"{place}: {error}") from None
        for (span, turn), end in zip(spans, ends, strict=True):
            if not whole.startswith(turn) or span.start >= span.stop:
                raise InputError(
                    f"{place}: the chat template writes message {end} differently when others follow, so the scored "
                    "text would not be what the model generates; set data.format.assistant_turns=apart (one document "
                    "per turn) or last"
                )
        # Remove the end of the document after the last turn: encoding adds it.
        whole = whole.rstrip().removesuffix(self._eos)
        return _segments(whole, [Span(span.start, min(span.stop, len(whole)), True) for span, _ in spans])

    def _span(self, messages: list[Message], written: str | None, place: Place | None) -> tuple[Span, str]:
        """The span of the last turn in the rendered `messages` (`written`, if it is known already), and that text.

        White space after the turn is not part of it, because generation has stopped by then.
        """
        turn = self._render(messages) if written is None else written
        prompt = self._prompt(messages[:-1])
        if not turn.startswith(prompt):
            raise InputError(
                f"{place or 'the chat'}: the chat template writes a prompt for message {len(messages)} that does not "
                f"match how it begins the message itself (the prompt ends in {prompt[-40:]!r}); choose another "
                "template, or set data.format.variables"
            )
        return Span(len(prompt), len(turn.rstrip()), True), turn

    def _prompt(self, messages: list[Message]) -> str:
        """The text up to the assistant's next turn; trailing spaces belong to the turn and are removed."""
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
            if type(error) is jinja2.TemplateError:  # raised by raise_exception(...) in a template
                raise _Refusal(error.message) from None
            raise ConfigError(f"the chat template fails: {type(error).__name__}: {error}") from None
        return written

    def _try_out(self) -> str:
        """Check that the template renders a question and its answer; return the text that ends the answer's turn."""
        try:
            asked = self._render(_PROBE[:1], add_generation_prompt=True)
            self._asks = asked != self._render(_PROBE[:1])
            whole = self._render(_PROBE)
        except _Refusal as refusal:
            raise ConfigError(f"the chat template rejects a question and its answer: {refusal}") from None
        for role, text in (("user", _QUESTION), ("assistant", _ANSWER)):
            if text not in whole:
                raise ConfigError(
                    f"the chat template does not write the {role}'s text; insert message['content'] where it belongs"
                )
        return whole[whole.rindex(_ANSWER) + len(_ANSWER) :].strip()

    def _marked(self, messages: Iterable[Message]) -> list[Message]:
        """The messages with marks around any text that spells a special token."""

        def mark(value: Any) -> Any:
            if isinstance(value, str):
                plain = value.replace(_OPEN, "").replace(_CLOSE, "")
                return self._special.sub(lambda found: f"{_OPEN}{found[0]}{_CLOSE}", plain)
            if isinstance(value, dict):
                return {key: mark(inner) for key, inner in value.items()}
            return [mark(inner) for inner in value] if isinstance(value, list | tuple) else value

        return [mark(message) for message in messages]


class Span(NamedTuple):
    """A range of text from `start` to `stop` (exclusive)."""

    start: int
    stop: int
    scored: bool


def _ends_of_turns(messages: list[Message]) -> list[int]:
    """The number of messages up to and including each assistant turn."""
    return [number for number, message in enumerate(messages, start=1) if message["role"] == "assistant"]


def _segments(text: str, spans: list[Span]) -> list[Segment]:
    """Split the text into segments: at `spans`, and at marked text, which is not the template's own and must not become
    special tokens."""
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
    """Raised when a template rejects a conversation, with the template's own message."""
