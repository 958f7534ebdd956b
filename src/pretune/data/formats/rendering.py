"""Run a chat template: Jinja in transformers' sandbox."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from pretune.core.config import ConfigError
from pretune.core.time_limit import time_limit
from pretune.data.formats.conversations import Conversation


class Refusal(Exception):
    """Raised when a template rejects a conversation, with the template's own message."""


SECONDS, CHARACTERS = 30.0, 2**24
"""What a rendering may take and write. Templates are programs: nested loops make them run for hours."""


class Template:
    """A chat template and its variables besides the conversation's own."""

    RESERVED: ClassVar = frozenset(
        {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"}
    )
    """Variables that a conversation cannot set."""

    def __init__(self, text: str, variables: Mapping[str, Any], seconds: float = SECONDS) -> None:
        self._text, self._variables, self._seconds = text, dict(variables), seconds

    def mentions(self, name: str) -> bool:
        """Whether the template has a variable of this name, or at least the word."""
        return re.search(rf"\b{re.escape(name)}\b", self._text) is not None

    def render(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        """The text that the template writes. Raises Refusal, or ConfigError for a template that fails or does not
        end."""
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with time_limit(self._seconds):
                (written,), _ = render_jinja_template(
                    [conversation.messages],
                    tools=[*conversation.tools] or None,
                    chat_template=self._text,
                    add_generation_prompt=add_generation_prompt,
                    **(self._variables | conversation.variables),
                )
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from None
        except Exception as error:
            if type(error) is jinja2.TemplateError:  # raised by raise_exception(...) in a template
                raise Refusal(error.message) from None
            raise ConfigError(f"the chat template fails: {type(error).__name__}: {error}") from None
        if len(written) > CHARACTERS:
            raise ConfigError(f"the chat template writes {len(written):,} characters; {CHARACTERS:,} are the limit")
        return written
