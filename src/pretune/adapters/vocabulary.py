"""What an adapter does to the embedding and the output head: LoRA on them, new rows, or all of both trained beside it.

Losses multiply hidden states by the head's weight themselves, a chunk of positions at a time, and a tied head is the
embedding's weight. So the weight that each of these layers shows is the one in effect: embedding and head of a tied
model stay one matrix, in training and after merging.

B rows, T tokens, P rows of a table, D model width, N trained rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretune.adapters.config import VOCABULARY
from pretune.adapters.layers import ADAPTER, LoraLinear
from pretune.adapters.quiet_peft import (
    ModulesToSaveWrapper,
    PeftLora,
    PeftLoraEmbedding,
    TrainableTokensWrapper,
)

ROWS, TABLES = "trainable_token_indices", "modules_to_save"
"""peft's keys for what is trained beside an adapter: ids by the name of a table, and names of tables."""


class LoraHead(LoraLinear):
    @property
    def weight(self) -> Tensor:
        """The weight with the update, [P, D]; differentiable by the factors."""
        return _updated(self)


class LoraEmbedding(PeftLoraEmbedding):
    @property
    def weight(self) -> Tensor:
        """The table with the update, [P, D], which is also a tied head's weight; differentiable by the factors."""
        return _updated(self)


def _updated(layer: LoraHead | LoraEmbedding) -> Tensor:
    own = layer.get_base_layer().weight
    assert isinstance(own, Tensor)
    return own if layer.disable_adapters or layer.merged else own + layer.get_delta_weight(ADAPTER)


class TrainedRows(TrainableTokensWrapper):
    """A frozen table, of which the rows `ids` are trained: peft's layer, without a copy of the table for each lookup.

    A copy of it is made where the whole weight is asked for.
    """

    index: Tensor
    places: Tensor

    def __init__(self, table: nn.Embedding | nn.Linear, ids: Sequence[int]) -> None:
        device, numbers = table.weight.device, list(ids)
        # Made by arange where that can be, because indices from a list are not taken among fake tensors.
        following = numbers == [*range(numbers[0], numbers[0] + len(numbers))]
        index = (
            torch.arange(numbers[0], numbers[-1] + 1, device=device) if following else torch.tensor(numbers).to(device)
        )
        super().__init__(table, ADAPTER, token_indices=index)  # pyright: ignore[reportArgumentType]
        self.token_adapter.token_indices[ADAPTER] = numbers
        places = torch.full((len(table.weight),), -1, device=device)
        places[index] = torch.arange(len(index), device=device)
        self.register_buffer("index", index, persistent=False)  # [N]
        self.register_buffer("places", places, persistent=False)  # [P], of a row among the trained ones; -1: none
        self.set_adapter(ADAPTER)

    @property
    def weight(self) -> Tensor:
        """The table with the trained rows, [P, D]."""
        own = self.token_adapter.base_layer.weight
        assert isinstance(own, Tensor)
        return own.index_copy(0, self.index, self._rows.to(own.dtype)) if self._enabled else own

    def forward(self, x: Tensor) -> Tensor:
        """The rows of tokens x [B, T], or logits of hidden states x [B, T, D]."""
        table = self.token_adapter.base_layer
        found = table(x)
        if not self._enabled:
            return found
        if isinstance(table, nn.Linear):
            return found.index_copy(-1, self.index, F.linear(x, self._rows).to(found.dtype))
        place = self.places[x]  # [B, T]
        return torch.where((place >= 0)[..., None], F.embedding(place.clamp(min=0), self._rows).to(found.dtype), found)

    def merge(self) -> nn.Module:
        """The table with the trained rows in place of its own; ValueError for values that are not finite."""
        self.token_adapter.merge(safe_merge=True)
        return self.token_adapter.base_layer

    @property
    def _rows(self) -> Tensor:
        return self.token_adapter.trainable_tokens_delta[ADAPTER]  # [N, D]

    @property
    def _enabled(self) -> bool:
        return not self.disable_adapters


class TrainedTable(ModulesToSaveWrapper):
    """A table that is trained as a whole, beside the frozen one that it began as."""

    def __init__(self, table: nn.Embedding | nn.Linear) -> None:
        super().__init__(table, ADAPTER)
        self.set_adapter(ADAPTER)

    @property
    def weight(self) -> Tensor:
        """The table in use, [P, D]."""
        return self._table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self._table(x)

    def merge(self) -> nn.Module:
        """The trained table; ValueError for values that are not finite."""
        if not self._table.weight.isfinite().all():
            raise ValueError
        return self._table

    @property
    def _table(self) -> Any:
        return self.original_module if self.disable_adapters else self.modules_to_save[ADAPTER]


def use_whole_tables(model: nn.Module) -> None:
    """Replace the classes of LoRA on the embedding and on the head of `model`, if it has some."""
    for name in VOCABULARY:
        layer = getattr(model, name, None)
        if isinstance(layer, PeftLora):
            layer.__class__ = LoraHead
        elif isinstance(layer, PeftLoraEmbedding):
            layer.__class__ = LoraEmbedding


def train_beside(model: nn.Module, section: Mapping[str, Any]) -> None:
    """Train rows, or all, of the embedding and the head of `model`, as `section` says by peft's keys, under our names.

    Attach the adapter before. Raises ValueError for a name that is neither the embedding nor a head of its own.
    """
    wanted: dict[str, Sequence[int] | None] = {**dict.fromkeys(section.get(TABLES) or ()), **(section.get(ROWS) or {})}
    for name, ids in wanted.items():
        table = getattr(model, name, None) if name in VOCABULARY else None
        if not isinstance(table, nn.Embedding | nn.Linear):
            raise ValueError(f"{name} is no table that can be trained beside the adapter")
        setattr(model, name, TrainedTable(table) if ids is None else TrainedRows(table, ids))


def beside(model: nn.Module) -> dict[str, TrainedRows | TrainedTable]:
    """What is trained beside the adapter of `model`, by name."""
    found = {name: getattr(model, name, None) for name in VOCABULARY}
    return {name: one for name, one in found.items() if isinstance(one, TrainedRows | TrainedTable)}


def section_of(model: nn.Module) -> dict[str, Any]:
    """The inverse of train_beside: peft's keys, under our names; none where nothing is trained beside."""
    layers = beside(model).items()
    rows = {name: layer.index.tolist() for name, layer in layers if isinstance(layer, TrainedRows)}
    tables = [name for name, layer in layers if isinstance(layer, TrainedTable)]
    return {**({ROWS: rows} if rows else {}), **({TABLES: tables} if tables else {})}
