"""Render conversations with a chat template, and locate the assistant's turns in the result.

A template is an arbitrary program, so turns are found by rendering prefixes of the conversation: an assistant turn is
what rendering up to and including it adds to the rendered prompt before it. Every such prefix must also be a prefix of
the whole rendered conversation. Generation uses the same prompt, rendered by the same call.

Rendering every prefix takes time that grows with the square of the number of turns. Most templates write one exchange
after another, so that each can be rendered after the first alone; where these pieces make up the whole, nothing else
is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from pretune.core.config import ConfigError, InputError
from pretune.data.formats.config import ChatFormat
from pretune.data.formats.conversations import Conversation, is_scored
from pretune.data.formats.messages import Turn
from pretune.data.formats.rendering import Refusal, Template
from pretune.data.formats.segments import Place, Segment, Unusable
from pretune.data.formats.special_tokens import TemplateTokens, spellings
from pretune.data.formats.template_source import NAMED, template_of

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
"""Mark text in a message that spells a special token; these are Unicode noncharacters, which do not occur in text."""

_QUESTION, _ANSWER = "What is the colour of the sea", "Blue on most days"
_ANSWERED = Turn({"role": "assistant", "content": _ANSWER}, None)
_PROBE = [Turn({"role": "user", "content": _QUESTION}, None), _ANSWERED]


class ChatTemplate:
    """A chat template with a tokenizer's special tokens.

    `end_of_turn` is the text that it writes after an assistant turn, without white space: generation stops there.
    Raises ConfigError for a template that is missing, is not valid Jinja, does not render the user's or the
    assistant's text, or writes special tokens of another tokenizer.
    """

    def __init__(self, config: ChatFormat, tokens: TemplateTokens) -> None:
        text = template_of(config, tokens)
        if text is None:
            raise ConfigError(
                "data.format.kind = chat needs a chat template, but the tokenizer has none; set data.format.template "
                f"(one of {', '.join(NAMED)}, a file, or a model to copy it from), or data/format=chat_plain"
            )
        self._eos, self._turns = tokens.eos, config.assistant_turns
        self._template = Template(text, {**config.variables, "bos_token": tokens.bos, "eos_token": tokens.eos})
        self._special = spellings(tokens)
        self._asks, self._closes = True, False
        self.end_of_turn: str = self._try_out()

    def prompt(self, conversation: Conversation) -> list[Segment]:
        """The prompt for the assistant's next turn.

        Raises InputError if the template rejects the chat.
        """
        marked = self._marked(conversation)
        try:
            text = self._prompt(marked)
            # Split into segments where training does, so that earlier turns get the same tokens as in training.
            earlier = _answers(marked) if self._turns == "together" else []
            spans = self._one_by_one(marked, earlier, text)
            if spans is None:
                turns = [self._span(_first(marked, end), None, None) for end, _ in earlier]
                spans = [span for span, turn in turns if text.startswith(turn)]
        except Refusal as refusal:
            raise InputError(f"the chat template rejects this chat: {refusal}") from None
        return _segments(text, [span._replace(scored=False) for span in spans])

    def documents(self, conversation: Conversation, place: Place) -> list[list[Segment]]:
        """The documents of a conversation that ends with the assistant, without the end-of-document token.

        Raises Unusable if the template rejects the conversation; InputError if it does not write the conversation's
        tools, does not read one of its variables, renders a turn differently when more turns follow, or if its prompt
        is not a prefix of the rendered turn.
        """
        self._check_reads(conversation, place)
        marked = self._marked(conversation)
        answers = _answers(marked)
        if self._turns == "together":
            return [self._document(marked, answers, place)]
        scored = [(end, True) for end, is_scored in answers if is_scored]
        scored = scored if self._turns == "apart" else scored[-1:]
        return [self._document(_first(marked, one[0]), [one], place) for one in scored]

    def _check_reads(self, conversation: Conversation, place: Place) -> None:
        """Raise InputError for what the row says and the template has no word for."""
        if conversation.tools and not self._template.mentions("tools"):
            raise InputError(
                f"{place} has tools, but the chat template does not write them, so the model would learn to call what "
                "it cannot see; choose another template, or leave them out with tools_columns=[] in the section"
            )
        for name in conversation.variables:
            if name in Template.RESERVED or not self._template.mentions(name):
                raise InputError(
                    f"{place} sets the variable {name}, which the chat template does not read; choose another "
                    "template, or leave the rows' variables out with variables_columns=[] in the format's section"
                )

    def _document(self, conversation: Conversation, answers: list[tuple[int, bool]], place: Place) -> list[Segment]:
        """The conversation as segments, of which the `answers` (see `_answers`) are some of their own."""
        try:
            whole = self._render(conversation)
            spans = self._one_by_one(conversation, answers, whole, to_the_end=True)
            if spans is None:
                spans = self._prefix_by_prefix(conversation, answers, whole, place)
        except Refusal as refusal:
            raise Unusable(f"the chat template rejects it: {refusal}") from None
        except ConfigError as error:
            raise InputError(f"{place}: {error}") from None
        # Remove the end of the document after the last turn: encoding adds it.
        whole = whole.rstrip().removesuffix(self._eos)
        return _segments(whole, [span._replace(stop=min(span.stop, len(whole))) for span in spans])

    def _one_by_one(
        self, conversation: Conversation, answers: list[tuple[int, bool]], whole: str, to_the_end: bool = False
    ) -> list[Span] | None:
        """Where the answers are in `whole`, from renderings of the first exchange with one other each.

        None if these renderings do not make up `whole` (`to_the_end`: all of it), or if there is nothing to gain.
        """
        if len(answers) < 3:
            return None
        begin = _first(conversation, answers[0][0])
        spans: list[Span] = []
        before, at, last = "", 0, 0
        try:
            for end, scored in answers:
                one = replace(conversation, turns=[*(begin.turns if last else []), *conversation.turns[last:end]])
                span, written = self._span(one, None, None)
                added = written[len(before) :]
                follows = written.startswith(before) and len(before) <= span.start < span.stop
                if not follows or not whole.startswith(added, at):
                    return None
                shift = at - len(before)
                spans.append(Span(span.start + shift, span.stop + shift, scored))
                at, last, before = at + len(added), end, before or written
        except (Refusal, InputError, ConfigError):
            return None
        return None if to_the_end and at != len(whole) else spans

    def _prefix_by_prefix(
        self, conversation: Conversation, answers: list[tuple[int, bool]], whole: str, place: Place
    ) -> list[Span]:
        """Where the answers are in `whole`; an unscored one that stands there differently is left out."""
        spans: list[Span] = []
        for end, scored in answers:
            try:
                spans.append(self._answer(conversation, end, scored, whole, place))
            except InputError:
                if scored:
                    raise
        return spans

    def _answer(self, conversation: Conversation, end: int, scored: bool, whole: str, place: Place) -> Span:
        """Where the turn that ends after `end` messages is in the whole rendered conversation."""
        span, turn = self._span(_first(conversation, end), whole if end == len(conversation.turns) else None, place)
        if not whole.startswith(turn) or span.start >= span.stop:
            raise InputError(
                f"{place}: the chat template writes message {end} differently when others follow, so the scored "
                "text would not be what the model generates; set data.format.assistant_turns=apart (one document "
                "per turn) or last"
            )
        return span._replace(scored=scored)

    def _span(self, conversation: Conversation, written: str | None, place: Place | None) -> tuple[Span, str]:
        """The span of the last turn in the rendered conversation (`written`, if it is known already), and that text.

        White space after the turn is not part of it, because generation has stopped by then.
        """
        turn = self._render(conversation) if written is None else written
        number = len(conversation.turns)
        prompt = self._prompt(_first(conversation, number - 1))
        if not turn.startswith(prompt):
            raise InputError(
                f"{place or 'the chat'}: the chat template writes a prompt for message {number} that does not "
                f"match how it begins the message itself (the prompt ends in {prompt[-40:]!r}); choose another "
                "template, or set data.format.variables"
            )
        return Span(len(prompt), len(turn.rstrip()), True), turn

    def _prompt(self, conversation: Conversation) -> str:
        """The text up to the assistant's next turn; trailing spaces belong to the turn and are removed."""
        if self._asks:
            return self._template.render(conversation, add_generation_prompt=True).rstrip(" ")
        written = self._render(replace(conversation, turns=[*conversation.turns, _ANSWERED]))
        if not written.startswith(self._unanswered(conversation)):
            raise ConfigError(
                "the chat template writes a chat differently once it is answered (Mistral's leaves the system message "
                "out), so training would not see what is asked; choose another template, or leave system messages out"
            )
        return written[: written.rindex(_ANSWER)].rstrip(" ")

    def _unanswered(self, conversation: Conversation) -> str:
        """The conversation as it stands, without white space at its end; empty if the template rejects it so."""
        try:
            return self._render(conversation).rstrip()
        except Refusal:
            return ""

    def _render(self, conversation: Conversation) -> str:
        """The rendered conversation, without what the template writes only at the end of one."""
        written = self._template.render(conversation)
        return written.rstrip().removesuffix(self._eos).rstrip() if self._closes else written

    def _try_out(self) -> str:
        """Check that the template renders a question and its answer; return the text that ends the answer's turn."""
        try:
            asked = self._template.render(Conversation(_PROBE[:1]), add_generation_prompt=True)
            self._asks = asked != self._template.render(Conversation(_PROBE[:1]))
            whole = self._template.render(Conversation(_PROBE))
        except Refusal as refusal:
            raise ConfigError(f"the chat template rejects a question and its answer: {refusal}") from None
        for role, text in (("user", _QUESTION), ("assistant", _ANSWER)):
            if text not in whole:
                raise ConfigError(
                    f"the chat template does not write the {role}'s text; insert message['content'] where it belongs"
                )
        self._closes = self._writes_eos_only_at_the_end(whole.rstrip())
        whole = self._render(Conversation(_PROBE))
        return whole[whole.rindex(_ANSWER) + len(_ANSWER) :].strip()

    def _writes_eos_only_at_the_end(self, whole: str) -> bool:
        """Whether EOS ends a conversation, as in Phi-3's template, and not each turn; `whole` is the rendered probe."""
        if not whole.endswith(self._eos):
            return False
        try:
            twice = self._template.render(Conversation(_PROBE * 2))
        except Refusal:  # from a template that takes a single question
            return False
        return not twice.startswith(whole) and twice.startswith(whole.removesuffix(self._eos).rstrip())

    def _marked(self, conversation: Conversation) -> Conversation:
        """The conversation with marks around any text that spells a special token."""

        def mark(value: Any) -> Any:
            if isinstance(value, str):
                plain = value.replace(_OPEN, "").replace(_CLOSE, "")
                return self._special.sub(lambda found: f"{_OPEN}{found[0]}{_CLOSE}", plain)
            if isinstance(value, dict):
                return {mark(key): mark(inner) for key, inner in value.items()}
            return [mark(inner) for inner in value] if isinstance(value, list | tuple) else value

        turns = [Turn(mark(turn.message), turn.scored) for turn in conversation.turns]
        return Conversation(turns, mark(conversation.tools), mark(conversation.variables))


class Span(NamedTuple):
    """A range of text from `start` to `stop` (exclusive)."""

    start: int
    stop: int
    scored: bool


def _first(conversation: Conversation, number: int) -> Conversation:
    return replace(conversation, turns=conversation.turns[:number])


def _answers(conversation: Conversation) -> list[tuple[int, bool]]:
    """The number of messages up to and including each of the assistant's turns, and whether it is scored."""
    turns = enumerate(conversation.turns, start=1)
    return [(number, is_scored(turn)) for number, turn in turns if turn.message["role"] == "assistant"]


def _segments(text: str, spans: Sequence[Span]) -> list[Segment]:
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
