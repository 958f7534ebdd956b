"""Run a model of transformers on fake tensors, which have shapes but no values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from pretune.core.config import ConfigError


@contextmanager
def without_values() -> Iterator[None]:
    """Let experts be traced: of torch's product of groups, torch 2.13 knows the shape only in bfloat16; of the one that
    transformers has in its place elsewhere, in any dtype.

    Raises ConfigError for a model whose computation depends on values in any other way.
    """
    from transformers.integrations import moe

    before = moe._can_use_grouped_mm
    moe._can_use_grouped_mm = lambda *given: False
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ConfigError(
            f"the memory of this model cannot be predicted, because what it computes depends on values ({error.func}); "
            "set batch.micro_batch to a number"
        ) from None
    finally:
        moe._can_use_grouped_mm = before
