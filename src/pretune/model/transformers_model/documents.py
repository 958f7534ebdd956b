"""Documents that share a row: positions within each, or each in a row of its own.

B rows, T tokens, D width of the hidden states.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.rnn import pad_sequence


def positions_within(document_ids: Tensor) -> Tensor:
    """Positions [B, T], counted from the start of each document of document_ids [B, T].

    transformers makes a mask of them: a position that does not follow the one before it begins another document.
    """
    columns = torch.arange(document_ids.shape[1], device=document_ids.device)
    begins = torch.where(document_ids[:, 1:] != document_ids[:, :-1], columns[1:], 0)
    starts = torch.cat((begins.new_zeros(len(begins), 1), begins), 1).cummax(1).values
    return columns - starts


def mask_within(document_ids: Tensor) -> Tensor:
    """The mask [B, 1, T, T] of causal attention within each document of document_ids [B, T]; true where it is
    allowed."""
    columns = torch.arange(document_ids.shape[1], device=document_ids.device)
    own = document_ids[:, :, None] == document_ids[:, None, :]
    return (own & (columns <= columns[:, None]))[:, None]


@torch.compiler.disable
def apart(states: Callable[[Tensor], Tensor], tokens: Tensor, document_ids: Tensor) -> Tensor:
    """The hidden states [B, T, D] of `states`, called on rows that hold one document each.

    Documents of similar length go together, the longest at most twice as long as the shortest, so that padding at their
    ends, which no earlier token sees, is less than half. Fake tensors, whose documents are not known, stay in their
    rows.
    """
    if isinstance(tokens, FakeTensor):
        return states(tokens)
    inner = positions_within(document_ids).flatten()
    starts = (inner == 0).nonzero()[:, 0].tolist()
    documents = [tokens.flatten()[a:b] for a, b in zip(starts, [*starts[1:], tokens.numel()], strict=True)]
    groups: dict[int, list[int]] = defaultdict(list)
    for number, document in enumerate(documents):
        groups[len(document).bit_length()].append(number)
    found: dict[int, Tensor] = {}
    for numbers in groups.values():
        hidden = states(pad_sequence([documents[number] for number in numbers], batch_first=True))
        found |= {number: row[: len(documents[number])] for number, row in zip(numbers, hidden, strict=True)}
    return torch.cat([found[number] for number in range(len(documents))]).unflatten(0, tokens.shape)
