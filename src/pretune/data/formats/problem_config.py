"""Configuration of formats for problems with a right answer."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

from pretune.data.formats.base_config import FormatBase, Names


class MathQAFormat(FormatBase):
    kind: Literal["mathqa"]
    """Multiple-choice problems with the fields Problem, Rationale, options and correct."""
    has_answers = True
    options: bool
    """List the five options in the prompt."""
    rationale: Literal["none", "after", "before"]
    """Leave the rationale out, or put it after or before the answer."""
    score_prompt: bool
    """Score the prompt's tokens too, not only the answer's."""

    @property
    def has_options(self) -> bool:
        return self.rationale != "before"

    @property
    def group(self) -> str:
        return self.kind

    @property
    def content_columns(self) -> tuple[str, ...]:
        return ("Problem", "options", "correct")  # with another rationale, it is still the same problem


class GSM8KFormat(FormatBase):
    kind: Literal["gsm8k"]
    """Grade-school problems: question, and an answer that ends in a line `#### number`."""
    has_answers = True
    calculations: bool
    """Keep the answer's calculator annotations, such as <<48/2=24>>."""
    score_prompt: bool
    """Score the question's tokens too, not only the answer's."""

    @property
    def group(self) -> str:
        return self.kind

    @property
    def content_columns(self) -> tuple[str, ...]:
        return ("question", "answer")


class MultipleChoiceFormat(FormatBase):
    kind: Literal["multiple_choice"]
    """Questions with any number of choices, one of which is right, in columns of any names."""
    has_answers = True
    name: Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")]
    """Name of the data set in its metrics: `NAME/accuracy`."""
    question: str
    """Column with the question or, where the choices complete it, the beginning of a text."""
    choices: Annotated[Names, Field(min_length=1)]
    """Column with the choices: a list of texts, of records {text, label}, or a record of lists {text, label}, or any of
    these as JSON text. Or several columns with one choice each."""
    answer: str
    """Column that says which choice is right."""
    answer_is: Literal["index_from_0", "index_from_1", "letter", "label", "text"]
    """What that column holds: the number of the choice, its letter (a is the first), its label, or its text."""
    template: str
    """The prompt, with {question} and, where choices are listed, {choices}: a line `A. text` for each."""
    reply: Literal["text", "letter"]
    """What is trained and compared: the text of the right choice, or its letter."""
    score_prompt: bool
    """Score the prompt's tokens too, not only the answer's."""

    @property
    def has_options(self) -> bool:
        return True

    @property
    def group(self) -> str:
        return self.name

    @property
    def content_columns(self) -> tuple[str, ...]:
        return (self.question, *self.choices, self.answer)

    @property
    def lists_choices(self) -> bool:
        """Whether the prompt has the choices."""
        return "{choices}" in self.template

    @pydantic.model_validator(mode="after")
    def _template_asks(self) -> Self:
        if self.template.count("{question}") != 1 or self.template.count("{choices}") > 1:
            raise ValueError("template must have {question} once, and {choices} at most once")
        if self.reply == "letter" and not self.lists_choices:
            raise ValueError("reply = letter, but the prompt has no letters: put {choices} into template")
        if self.template != self.template.rstrip(" "):
            raise ValueError("template ends with a space, which belongs to the answer: leave it out")
        return self

    @pydantic.model_validator(mode="after")
    def _name_is_free(self) -> Self:
        if re.fullmatch(r"train|time|preference|val|val_.*", self.name):
            raise ValueError(f"name = {self.name} is a group of other metrics: choose another")
        return self
