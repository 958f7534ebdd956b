"""Chats with any number of turns, rendered by a chat template."""

from __future__ import annotations

from collections.abc import Sequence

from pretune.data.formats.chat_template import ChatTemplate, TemplateTokens
from pretune.data.formats.config import ChatFormat
from pretune.data.formats.conversations import Message, conversation, read_messages
from pretune.data.formats.formatter import Formatter, last_message
from pretune.data.formats.segments import Place, Segment
from pretune.data.sources.rows import Row


class Chat(Formatter):
    """Rows with a list of messages; `tokens`: the tokenizer's chat template and special tokens.

    Raises ConfigError for a chat template that is missing or cannot be used.
    """

    has_turns = True

    def __init__(self, config: ChatFormat, tokens: TemplateTokens) -> None:
        self._config, self._template = config, ChatTemplate(config, tokens)
        self.end_of_turn = self._template.end_of_turn

    def documents(self, row: Row, place: Place) -> list[list[Segment]]:
        return self._template.documents(conversation(self._config, row, place), place)

    def prompt(self, row: Row, place: Place) -> list[Segment]:
        messages = read_messages(self._config, row, place)
        answered = bool(messages) and messages[-1]["role"] == "assistant"
        return self.render_prompt(messages[:-1] if answered else messages)

    def render_prompt(self, messages: Sequence[Message]) -> list[Segment]:
        last_message(messages)
        return self._template.prompt(messages)

    def as_row(self, messages: Sequence[Message]) -> Row:
        role, content = self._config.role_keys[0], self._config.content_keys[0]
        return {self._config.columns[0]: [{role: one["role"], content: one["content"]} for one in messages]}
