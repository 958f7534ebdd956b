"""Build the formatter for a data.format section; the only place that knows all formats."""

from __future__ import annotations

from typing import assert_never

from pretune.data.formats.arc import Arc
from pretune.data.formats.chat import Chat
from pretune.data.formats.config import (
    ArcFormat,
    ChatFormat,
    FormatConfig,
    InstructionFormat,
    LongTaskFormat,
    PreferenceFormat,
    PromptCompletionFormat,
    TextFormat,
)
from pretune.data.formats.formatter import Formatter
from pretune.data.formats.gsm8k import GSM8K
from pretune.data.formats.instruction import Instruction
from pretune.data.formats.long_task import LongTask
from pretune.data.formats.mathqa import MathQA
from pretune.data.formats.multiple_choice import MultipleChoice
from pretune.data.formats.preferences import Preferences
from pretune.data.formats.problem_config import GSM8KFormat, MathQAFormat, MultipleChoiceFormat
from pretune.data.formats.prompt_completion import PromptCompletion
from pretune.data.formats.special_tokens import TemplateTokens
from pretune.data.formats.text import Text


def build_formatter(config: FormatConfig, tokens: TemplateTokens) -> Formatter:
    """The formatter for a section; `tokens`: the tokenizer's chat template and special tokens.

    Raises ConfigError for a chat template that is missing or cannot be used.
    """
    match config:
        case TextFormat():
            return Text(config, tokens)
        case LongTaskFormat():
            return LongTask()
        case InstructionFormat():
            return Instruction(config)
        case PromptCompletionFormat():
            return PromptCompletion(config, tokens)
        case GSM8KFormat():
            return GSM8K(config)
        case MathQAFormat():
            return MathQA(config)
        case MultipleChoiceFormat():
            return MultipleChoice(config)
        case ChatFormat():
            return Chat(config, tokens)
        case PreferenceFormat():
            return Preferences(config, build_formatter(config.template, tokens))
        case ArcFormat():
            return Arc(config, build_formatter(config.template, tokens))
        case _:
            assert_never(config)
