"""Give a model rows for more tokens, or take rows from it: in its embedding, its head and its value embeddings.

V token ids, P rows of a table (V, padded), D columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from pretune.model.build import Model
from pretune.model.transformers_model.model import TransformersModel


def resize(model: Model, vocab_size: int) -> None:
    """Give `model` tables for `vocab_size` token ids, padded as its configuration says. Rows that were there keep their
    values, and new ones have none yet: fill or load them. Do it before the optimizer is built."""
    if vocab_size == model.config.vocab_size:
        return
    if isinstance(model, TransformersModel):
        model.resize(vocab_size)
        return
    model.config = model.config.model_copy(update={"vocab_size": vocab_size})
    for table in _tables(model):
        resize_table(table, model.config.padded_vocab_size)


def add_tokens(model: Model, vocab_size: int, ids: Sequence[int]) -> None:
    """Grow `model` to `vocab_size` token ids, of which `ids`, the last that any token has, are new. In each table,
    their rows, and all others that it did not have, become the mean of the rows of the tokens before them; padding
    becomes zeros.

    That is the initialization of transformers' resize_token_embeddings without its noise, whose covariance is 1e-9 of
    the old rows'. The logit of a new token is then the mean of the old ones, which bounds the change of all
    probabilities (Hewitt 2021, Initializing New Word Embeddings for Pretrained Language Models).
    """
    before = model.config.vocab_size
    resize(model, vocab_size)
    for table in _tables(model):
        fill_rows(table, [*ids, *range(before, vocab_size)], min(ids, default=before))
        table.weight.detach()[vocab_size:] = 0.0


def resize_table(table: nn.Embedding | nn.Linear, rows: int) -> None:
    """Give a table another number of rows; those that were there keep their values, new ones have none yet."""
    old = table.weight.detach()
    new = old.new_empty(rows, old.shape[1])
    kept = min(rows, len(old))
    new[:kept] = old[:kept]
    table.weight = nn.Parameter(new, table.weight.requires_grad)
    if isinstance(table, nn.Embedding):
        table.num_embeddings = rows
    else:
        table.out_features = rows


def fill_rows(table: nn.Embedding | nn.Linear, rows: Sequence[int], known: int) -> None:
    """Set rows of a table, and of its bias, to the mean of its first `known` rows."""
    for values in (table.weight, getattr(table, "bias", None)):
        if values is not None:
            values = values.detach()
            values[[*rows]] = values[:known].mean(0, dtype=torch.float32).to(values)


def _tables(model: Model) -> Iterator[nn.Embedding | nn.Linear]:
    """The layers with a row per token of the vocabulary."""
    if isinstance(model, TransformersModel):
        yield from (model.embedded, model.head)  # tied ones share a matrix, but a head may have a bias beside it
        return
    yield model.embedding
    if model.head is not None:
        yield model.head
    beside = (module for name, module in model.layers.named_modules() if name.endswith(".value_embedding"))
    yield from (module for module in beside if isinstance(module, nn.Embedding))
