"""What is minimised, as YAML says it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pretune.config import Section


class LanguageModelingConfig(Section):
    kind: Literal["language_modeling"]
    """Cross-entropy of the next token."""
    chunk_tokens: Annotated[int, Field(ge=1)]
    """Positions whose logits are held in float32 at one time; fewer saves memory, too few costs speed."""
