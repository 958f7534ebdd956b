"""What a model of transformers remembers while it generates.

B rows, T new tokens, D width of the hidden states.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_NAMES = ("past_key_values", "cache_params", "state")
"""transformers' names for what it continues from, in the arguments and in the output of a model."""


class LibraryCache:
    """transformers' own cache, made by the model when it reads the first tokens, behind the interface of a KVCache.

    starts [B]: the column of each row's first real token; columns before it are left padding. Rows are read `together`,
    with a mask over the padding, or one by one without padding where the model knows no mask (recurrent ones). A model
    without any cache reads its whole text anew for each token.
    """

    def __init__(self, starts: Tensor, takes_positions: bool, together: bool) -> None:
        self._takes_positions, self._together = takes_positions, together
        self._starts, self._length = starts, 0
        self._padded = bool(starts.any())
        self._state: dict[str, Any] = {}
        self._rows = [_Row(start) for start in starts.tolist()]

    def to_read(self, tokens: Tensor) -> Tensor:
        """tokens [B, T]: new tokens alone continue the text."""
        return tokens

    def advance(self, num_new: int, whole: bool = False) -> None:
        """Nothing: transformers' cache grows by itself, and is not compiled (`whole`)."""
        assert not whole, "decoding with transformers' models is not compiled"

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows of the batch: integer indices, possibly repeated."""
        if self._together:
            self._starts = self._starts[rows]
            self._state["past_key_values"].batch_select_indices(rows)
            return
        seen: set[int] = set()
        kept: list[_Row] = []
        for row in rows.tolist():
            kept.append(copy.deepcopy(self._rows[row]) if row in seen else self._rows[row])
            seen.add(row)
        self._rows = kept

    def read(self, backbone: Any, tokens: Tensor) -> Tensor:
        """Hidden states [B, T, D] of tokens [B, T], which continue what was read before; those of padding have no
        meaning."""
        if not self._together:
            return torch.cat([row.read(backbone, new[None]) for row, new in zip(self._rows, tokens, strict=True)])
        before, self._length = self._length, self._length + tokens.shape[1]
        arguments: dict[str, Tensor] = {}
        if self._padded:
            columns = torch.arange(self._length, device=tokens.device)
            arguments["attention_mask"] = (columns >= self._starts[:, None]).long()  # [B, all columns]
            if self._takes_positions:
                arguments["position_ids"] = (columns[before:] - self._starts[:, None]).clamp(min=0)
        output = backbone(input_ids=tokens, use_cache=True, **self._state, **arguments)
        self._state = _continuation(output)
        return output[0]


class _Row:
    """One text: what the model continues from, or all tokens of a model that has nothing to continue from."""

    def __init__(self, start: int) -> None:
        self._start = start
        self._state: dict[str, Any] = {}
        self._tokens: Tensor | None = None

    def read(self, backbone: Any, tokens: Tensor) -> Tensor:
        """Hidden states [1, T, D] of tokens [1, T]; zeros for padding."""
        new = tokens[:, self._start :]
        padding, self._start = self._start, 0
        if not self._state:
            self._tokens = new if self._tokens is None else torch.cat((self._tokens, new), 1)
        read = new if self._state or self._tokens is None else self._tokens
        output = backbone(input_ids=read, use_cache=True, **self._state)
        self._state = _continuation(output)
        return F.pad(output[0][:, -new.shape[1] :], (0, 0, padding, 0))


def _continuation(output: Any) -> dict[str, Any]:
    """What a model's output offers to continue from, by the name of the argument that takes it."""
    for name in _NAMES:
        found = output.get(name)
        if found is not None:
            return {name: found}
    return {}
