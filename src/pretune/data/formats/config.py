"""Configuration of data formats: how a row becomes text, and which parts of it are scored."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

from pretune.data.formats.base_config import FormatBase, Names
from pretune.data.formats.grid_config import AugmentConfig, GridConfig
from pretune.data.formats.problem_config import GSM8KFormat, MathQAFormat, MultipleChoiceFormat


class TextFormat(FormatBase):
    kind: Literal["text"]
    """One column of plain text; everything is scored."""
    column: str
    """Name of the column."""
    parse_special: bool
    """Text that spells a special token, such as <|im_end|>, becomes that token; false keeps it as plain text."""

    @property
    def content_columns(self) -> tuple[str, ...]:
        return (self.column,)


class InstructionFormat(FormatBase):
    kind: Literal["instruction"]
    """Alpaca's fields instruction, input (may be empty) and output."""
    preamble: bool
    """Begin with the sentence of Alpaca's published prompt; without it, a record is about a fifth shorter."""
    score_prompt: bool
    """Score the prompt's tokens too, not only the output's."""
    refuse_columns: tuple[str, ...]
    """Columns that Alpaca's prompt has no place for: a row with something in one is an error. data/format=chat has a
    place for them; [] leaves them out of the text."""

    @property
    def content_columns(self) -> tuple[str, ...]:
        return ("instruction", "input", "output")


class PromptCompletionFormat(FormatBase):
    kind: Literal["prompt_completion"]
    """One column with the prompt and one with its completion."""
    prompt: str
    """Name of the prompt's column. Trailing spaces are moved to the completion, where tokenizers expect them."""
    completion: str
    """Name of the completion's column."""
    score_prompt: bool
    """Score the prompt's tokens too, not only the completion's."""
    parse_special: bool
    """Text that spells a special token, such as <|im_end|>, becomes that token; false keeps it as plain text."""

    @property
    def content_columns(self) -> tuple[str, ...]:
        return (self.prompt, self.completion)


Role = Literal["system", "developer", "user", "assistant", "tool", "tool_call"]
"""`tool_call` is an assistant's turn whose text is a call {name, arguments} in JSON, or a list of them."""


class MessagesBase(FormatBase):
    """Base of the formats that read messages: what their keys and roles are called in the data."""

    role_keys: Annotated[Names, Field(min_length=1)]
    """Keys of a message that may hold its role."""
    content_keys: Annotated[Names, Field(min_length=1)]
    """Keys of a message that may hold its text."""
    score_keys: Names
    """Keys of a message that may say whether it is scored: true or 1, false or 0; null says nothing. Other values, and
    true for a message that is not the assistant's, are errors."""
    roles: dict[str, Role]
    """Maps role names in the data to roles; a role that is not listed is an error. tool_call is an assistant's turn
    whose text is a call {name, arguments} in JSON."""


class ChatFormat(MessagesBase):
    kind: Literal["chat"]
    """Conversations, rendered by the tokenizer's chat template. The assistant's turns are scored, each with the token
    that ends it."""
    columns: Annotated[Names, Field(min_length=1)]
    """Columns that may hold the list of messages; the first one present in a row is read."""
    prompt_columns: Names
    """Columns that may hold the prompt, as text or messages, of a row without a list of messages. Nothing in it is
    scored."""
    input_columns: Names
    """Columns with more text for a prompt that is text; it is put on the next line."""
    completion_columns: Names
    """Columns that may hold the completion, as text or messages, of such a prompt."""
    system_columns: Names
    """Columns that may hold the text of the system message."""
    history_columns: Names
    """Columns that may hold earlier turns, as pairs of texts [user, assistant] or as messages."""
    tools_columns: Names
    """Columns that may hold the tools that the template lists, as JSON schemas or as their text. A row with tools is
    an error if the template does not write them."""
    variables_columns: Names
    """Columns that may hold variables of the template for this row, above `variables`. One that the template does not
    read is an error."""
    template: str | None
    """The chat template: Jinja text, a file with it, a model's folder or `owner/name` on the hub to copy it from, or
    one that comes with Pretune: chatml, llama3, gemma. null takes the tokenizer's own."""
    variables: dict[str, str | int | bool]
    """Template variables besides messages, such as enable_thinking or date_string."""
    assistant_turns: Literal["together", "apart", "last"]
    """together scores all assistant turns in one document; apart makes one document per turn, in which only that turn
    is scored, for templates that change earlier turns (such as those that drop thinking); last scores only the last
    turn."""

    @property
    def content_columns(self) -> tuple[str, ...]:
        return self.columns


class PreferenceFormat(MessagesBase):
    kind: Literal["preference"]
    """Pairs of answers to one prompt: prompt, chosen and rejected, as texts or lists of messages; without a prompt
    column, the prompt is the common beginning of chosen and rejected."""
    has_pairs = True
    prompt_columns: Names
    """Columns that may hold the prompt; the first one present in a row is read."""
    template: Annotated[InstructionFormat | PromptCompletionFormat | ChatFormat, Field(discriminator="kind")]
    """Format of a prompt with one of its answers: the one used in the preceding instruction tuning."""

    @property
    def content_columns(self) -> tuple[str, ...]:
        return ("prompt", "chosen", "rejected")

    @pydantic.model_validator(mode="after")
    def _only_the_answer_is_scored(self) -> Self:
        if isinstance(self.template, ChatFormat):
            if self.template.assistant_turns != "last":
                raise ValueError("template.assistant_turns must be last: the sides differ in their last turn")
        elif self.template.score_prompt:
            raise ValueError("template.score_prompt must be false: both sides have the same prompt")
        return self


class LongTaskFormat(FormatBase):
    kind: Literal["long_task"]
    """Rows of the source long_task: text with something in it that the end asks for; the answer alone is scored."""

    @property
    def content_columns(self) -> tuple[str, ...]:
        return ("needles", "question", "answer")


class ArcFormat(FormatBase):
    kind: Literal["arc"]
    """Tasks with the fields id, train and test: pairs of grids that show a rule, and tests to apply it to."""
    has_tasks = True
    instruction: str
    """Text before the pairs; empty for none."""
    grid: GridConfig
    """How a grid becomes text."""
    augment: AugmentConfig
    """Variants of each example, also of held-out ones."""
    leave_one_out: bool
    """Also make an example of each pair, after all others."""
    template: Annotated[InstructionFormat | PromptCompletionFormat | ChatFormat, Field(discriminator="kind")]
    """Format of the pairs with a test's input, and of its output: plain text, or a chat."""

    @property
    def group(self) -> str:
        return self.kind

    @property
    def content_columns(self) -> tuple[str, ...]:
        return ("train",)  # tasks that show the same pairs are the same, whatever their ids and tests


FormatConfig = Annotated[
    TextFormat
    | LongTaskFormat
    | MathQAFormat
    | InstructionFormat
    | PromptCompletionFormat
    | GSM8KFormat
    | MultipleChoiceFormat
    | ChatFormat
    | PreferenceFormat
    | ArcFormat,
    Field(discriminator="kind"),
]


def chat_format(format: FormatConfig) -> ChatFormat | None:
    """The chat format that `format` is, or that its prompts and answers are written in; None for other formats."""
    inner = format.template if isinstance(format, PreferenceFormat | ArcFormat) else format
    return inner if isinstance(inner, ChatFormat) else None
