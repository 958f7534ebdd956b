"""Convert adapters that peft saved for a model of transformers to ours: the inverse of huggingface.py.

Where we stack several of their layers into one, their updates become one of the summed rank: the first factors one
above the other, the second factors along the diagonal. Layers of a stack that share their first factor, as in our own
exports, keep their rank. A layer of the stack without an adapter has an update of zeros.

E rows and D columns of a layer's weight, r its rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretune.adapters.attach import Patterns, selected_layers, targets_of
from pretune.adapters.config import VOCABULARY, TrainedAdapterConfig
from pretune.adapters.files import PREFIX, adapter_tensors, read_adapter
from pretune.adapters.huggingface import BY_ROWS, Layers
from pretune.adapters.peft_settings import MERGE, PeftSettings, peft_settings
from pretune.core.config import InputError
from pretune.core.named_tensors import copy_over

_BY_RANKS = ("lora_A.", "hada_w1_b", "hada_w2_b")
"""Adapter tensors [r, D]. Those of BY_ROWS are [E, r], or [E] for DoRA's magnitudes."""
_MAGNITUDE = "lora_magnitude_vector"
_SCALED = ("lora_B.", "hada_w1_a")
"""The tensors that take the difference between the scale of a layer and that of its stack."""
_EMBEDDINGS = ("embed_tokens", "wte")
"""Ends of the names that transformers has for the embedding."""


class _Piece(NamedTuple):
    """One of their layers, with its place within ours."""

    name: str
    rows: slice
    ranks: slice
    factor: float


class _Stack(NamedTuple):
    """One of our layers that has an adapter."""

    name: str
    pieces: list[_Piece]
    bare: list[str]
    """Those of its layers in transformers that have none."""
    rank: int
    alpha: float


@dataclass(frozen=True)
class TheirAdapter:
    """An adapter that peft saved for a model of transformers."""

    folder: Path
    settings: PeftSettings
    stored: Mapping[str, Tensor]
    stacks: Sequence[_Stack]

    @property
    def patterns(self) -> Patterns:
        """The ranks and alphas of our layers that are not those of the settings."""
        return Patterns(
            {one.name: one.rank for one in self.stacks if one.rank != self.settings.rank},
            {one.name: one.alpha for one in self.stacks if one.alpha != self.settings.alpha},
        )

    def check(self, section: TrainedAdapterConfig, model: nn.Module) -> None:
        """Raise InputError, with the keys to set, unless `section` describes this adapter on the plain `model`."""
        names, wanted = {one.name for one in self.stacks}, self.settings.differences(section)
        if not names:
            raise InputError(f"the adapter in {self.folder} is on no layer of the model of stage.init_from")
        for one in self.stacks:
            if self.settings.kind == "lokr" and len(one.pieces) + len(one.bare) > 1:
                raise InputError(
                    f"the adapter in {self.folder} is on {_ends(piece.name for piece in one.pieces)}, part of one "
                    f"layer here ({_ends([one.name])}), and Kronecker products cannot be stacked: {MERGE}"
                )
        apart = getattr(model, "head", None) is None and not self.settings.tied
        if apart and (found := sorted(names & set(VOCABULARY))):
            raise InputError(
                f"the adapter in {self.folder} is on the {found[0]} alone (without ensure_weight_tying), and this "
                f"model has one matrix for embedding and head: {MERGE}"
            )
        if selected_layers(model, section.targets) != names:
            wanted["adapter.targets"] = f"[{','.join(targets_of(model, names))}]"
        if wanted:
            settings = " ".join(f"{key}={value}" for key, value in wanted.items())
            raise InputError(f"the adapter in {self.folder} is another than `adapter` describes: set {settings}")

    def notes(self, base: str) -> list[str]:
        """What is worth knowing before it is trained on the weights called `base`."""
        lines, named = [], self.settings.base
        if named is not None and not _is_same(named, base):
            lines.append(f"the adapter in {self.folder} says that it was trained on {named}, not on {base}")
        stacks = [one for one in self.stacks if one.bare]
        # An update that is a product of two matrices of zeros, as LoHa's, has no gradient.
        if stacks and self.settings.kind != "loha":
            lines.append(
                f"the adapter in {self.folder} is not on {_ends(name for one in stacks for name in one.bare)}, part of "
                f"one layer here ({_ends(one.name for one in stacks)}): training adapts them too"
            )
        return lines

    def load(self, model: nn.Module) -> None:
        """Load it into `model`, which must have an adapter of this kind with these patterns.

        Raises InputError, naming the tensors, if it does not fit, and leaves `model` as it was.
        """
        own = adapter_tensors(model)
        # Where it has no values, magnitudes stay the norms of the weight's rows; all else is zero.
        new = {
            name: tensor.detach().clone() if _MAGNITUDE in name else torch.zeros_like(tensor)
            for name, tensor in own.items()
        }
        faults, used = [], self._of_base(model)
        for name, place, factor in self._places(new):
            used.add(name)
            stored = self.stored.get(name)
            if stored is None:
                faults.append(f"{name} is missing")
            elif stored.shape != place.shape:
                faults.append(f"{name} is {list(stored.shape)}, in the model {list(place.shape)}")
            else:
                place.copy_(stored if factor == 1 else stored * factor)
        faults += [f"{name} has no place" for name in self.stored if name not in used]
        if faults:
            more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
            raise InputError(
                f"the adapter in {self.folder} does not fit the model of stage.init_from: {'; '.join(faults[:3])}{more}"
            )
        copy_over(new, own)

    def _places(self, new: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, float]]:
        """The tensors that it must have, each with its place in `new` and what it is multiplied by."""
        for stack in self.stacks:
            start = f"{PREFIX}{stack.name}."
            for name in (name for name in new if name.startswith(start)):
                part = name.removeprefix(start)
                for piece in stack.pieces:
                    factor = piece.factor if part.startswith(_SCALED) else 1.0
                    yield f"{PREFIX}{piece.name}.{part}", _place(new[name], part, piece), factor

    def _of_base(self, model: nn.Module) -> set[str]:
        """The names of tensors that are the model's own embedding and head, which peft may save with an adapter; they
        change nothing. InputError where they are others."""
        own, found = dict(model.named_parameters()), set()
        for name, stored in self.stored.items():
            theirs = name.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".base_layer")
            is_embedding = theirs.endswith(_EMBEDDINGS) or getattr(model, "head", None) is None
            if not theirs.endswith((*_EMBEDDINGS, "lm_head")):
                continue
            ours = "embedding" if is_embedding else "head"
            base = own.get(f"{ours}.base_layer.weight", own.get(f"{ours}.weight"))
            assert base is not None
            if stored.shape[1:] != base.shape[1:] or not torch.equal(base[: len(stored)].to(stored), stored):
                raise InputError(
                    f"the adapter in {self.folder} has its own {name.removeprefix(PREFIX)}, which is not that of "
                    f"stage.init_from: {MERGE}"
                )
            found.add(name)
        return found


def their_adapter(folder: Path, layers: Layers) -> TheirAdapter:
    """The adapter that peft saved in `folder` for the model of transformers that has `layers`.

    Raises InputError if it cannot be read, or computes what ours cannot.
    """
    stored, content = read_adapter(folder)
    settings = peft_settings(folder, content)
    if settings.tied and "head" not in layers:  # peft may store the factors of the one matrix twice
        stored = {name: one for name, one in stored.items() if not name.startswith(f"{PREFIX}lm_head.lora_")}
    adapted = {_layer_of(name) for name in stored}
    stacks = [
        _stack(name, parts, adapted, settings, stored)
        for name, parts in layers.items()
        if any(theirs in adapted for theirs, _ in parts)
    ]
    return TheirAdapter(folder, settings, stored, stacks)


def has_our_names(folder: Path, model: nn.Module) -> bool:
    """Whether the adapter in `folder` names the layers of `model`; InputError if there is none."""
    ours = {name for name, _ in model.named_modules()}
    return any(_layer_of(name) in ours for name in read_adapter(folder)[0])


def _stack(
    name: str, parts: Sequence[tuple[str, int]], adapted: set[str], of: PeftSettings, stored: Mapping[str, Tensor]
) -> _Stack:
    on = [theirs for theirs, _ in parts if theirs in adapted]
    forms = [(of.rank_of(theirs), of.alpha_of(theirs)) for theirs in on]
    shared = len(on) == len(parts) and len(set(forms)) == 1 and _share(on, stored)
    first, alpha = forms[0]
    rank = first if shared else sum(rank for rank, _ in forms)
    pieces, row, at = [], 0, 0
    for theirs, rows in parts:
        if theirs in adapted:
            own_rank, own_alpha = forms[len(pieces)]
            ranks = slice(0, rank) if shared else slice(at, at + own_rank)
            # The stack has one scale, that of its first layer.
            factor = of.scale(own_alpha, own_rank) / of.scale(alpha, first)
            pieces.append(_Piece(theirs, slice(row, row + rows), ranks, factor))
            at += own_rank
        row += rows
    alpha *= math.sqrt(rank / first) if of.rslora else rank / first
    return _Stack(name, pieces, [theirs for theirs, _ in parts if theirs not in adapted], rank, alpha)


def _share(layers: Iterable[str], stored: Mapping[str, Tensor]) -> bool:
    """Whether layers have equal first factors."""
    first, *others = (
        {part: one for part, one in _parts_of(layer, stored) if part.startswith(_BY_RANKS)} for layer in layers
    )
    return all(
        one.keys() == first.keys() and all(torch.equal(one[part], first[part]) for part in first) for one in others
    )


def _parts_of(layer: str, stored: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    start = f"{PREFIX}{layer}."
    return ((name.removeprefix(start), tensor) for name, tensor in stored.items() if name.startswith(start))


def _place(whole: Tensor, part: str, piece: _Piece) -> Tensor:
    """The view of our tensor that takes the one of their layer."""
    if part.startswith(_BY_RANKS):
        return whole[piece.ranks]
    if part.startswith(BY_ROWS):
        return whole[piece.rows, piece.ranks] if whole.dim() == 2 else whole[piece.rows]
    # Columns beyond theirs are padding of the vocabulary.
    return whole[:, piece.rows] if part.startswith("lora_embedding_A") else whole


def _layer_of(name: str) -> str:
    """The layer that an adapter's tensor belongs to; for other tensors, their name."""
    return re.split(r"\.(?=lora_|hada_|lokr_)", name.removeprefix(PREFIX), maxsplit=1)[0]


def _ends(names: Iterable[str]) -> str:
    """The different last words of names of layers."""
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _is_same(named: str, base: str) -> bool:
    """Whether two names of models, folders or `owner/name@revision`, may mean the same one."""
    if Path(named).resolve() == Path(base).resolve():
        return True
    (name, _, revision), (other, _, commit) = named.partition("@"), base.partition("@")
    return name == other and (revision == commit or not (len(revision) == len(commit) == 40))
