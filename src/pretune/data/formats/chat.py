"""Chats with any number of turns, rendered by a chat template."""

from __future__ import annotations

from collections.abc import Sequence

from pretune.data.formats.chat_template import ChatTemplate
from pretune.data.formats.config import ChatFormat
from pretune.data.formats.conversations import (
    Conversation,
    columns_beside,
    read_conversation,
    trainable,
    unread,
    with_columns,
)
from pretune.data.formats.formatter import Formatter, last_message
from pretune.data.formats.messages import Message, Turn
from pretune.data.formats.segments import Place, Segment
from pretune.data.formats.special_tokens import TemplateTokens
from pretune.data.sources.rows import Row


class Chat(Formatter):
    """Rows with a list of messages; `tokens`: the tokenizer's chat template and special tokens.

    Raises ConfigError for a chat template that is missing or cannot be used.
    """

    has_turns = True

    def __init__(self, config: ChatFormat, tokens: TemplateTokens) -> None:
        self._config, self._template = config, ChatTemplate(config, tokens)
        self.end_of_turn, self.columns_beside = self._template.end_of_turn, columns_beside(config)

    def documents(self, row: Row, place: Place) -> list[list[Segment]]:
        return self._template.documents(trainable(read_conversation(self._config, row, place, completed=True)), place)

    def prompt(self, row: Row, place: Place) -> list[Segment]:
        conversation = read_conversation(self._config, row, place, completed=False)
        turns = conversation.turns
        answered = bool(turns) and turns[-1].message["role"] == "assistant"
        return self._prompt(Conversation(turns[:-1] if answered else turns, conversation.tools, conversation.variables))

    def render_prompt(self, messages: Sequence[Message]) -> list[Segment]:
        return self._prompt(Conversation([Turn(message, None) for message in messages]))

    def answer_documents(self, turns: list[Turn], row: Row, place: Place) -> list[list[Segment]]:
        return self._template.documents(trainable(with_columns(self._config, turns, row, place)), place)

    def unread(self, row: Row) -> set[str]:
        return unread(self._config, row)

    def _prompt(self, conversation: Conversation) -> list[Segment]:
        last_message(conversation.messages)
        return self._template.prompt(conversation)
