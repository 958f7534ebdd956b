"""A language model that transformers builds, behind the interface of our Transformer.

B rows, T tokens, D width of the hidden states, V token ids.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretune.core.config import ConfigError, InputError
from pretune.core.quiet import quiet
from pretune.model.transformers_model.caches import LibraryCache
from pretune.model.transformers_model.config import TransformersConfig, library_config
from pretune.model.transformers_model.documents import apart, mask_within, positions_within

_SCALES = {"logit_scale": 1, "logits_scaling": -1, "lm_head_multiplier": 1}
"""transformers' names for a factor on the logits, and the power of it that they are multiplied with."""

_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
"""transformers' names for the softcap of the logits."""


Way = Literal["positions", "mask", "rows"]
"""How documents that share a row are kept apart: by positions from which transformers makes a mask, by a mask of ours,
or each in a row of its own."""


@dataclass(frozen=True)
class Shape:
    """What objectives and generation ask of a model's configuration."""

    vocab_size: int
    max_sequence_length: int
    softcap: float | None


class TransformersModel(nn.Module):
    """transformers' model, from token ids to hidden states; `unembed` turns hidden states into logits.

    Hidden states are what the output head reads. Whatever that does besides a product with its matrix is kept: a factor
    on the logits multiplies the hidden states, and for a bias they have one more component, which is 1, and the head's
    matrix one more column. `check` shows that the logits are transformers' own.

    Call `reset_parameters` or `adopt` after building it.
    """

    def __init__(self, config: TransformersConfig) -> None:
        super().__init__()
        self.section = config
        self.inner = _built(config)
        library, given = config.library, inspect.signature(self.backbone.forward).parameters
        softcap = next((found for name in _SOFTCAPS if (found := getattr(library, name, None))), None)
        self.config = Shape(config.vocab_size, config.max_sequence_length, softcap)
        self._scale = 1.0
        for name, power in _SCALES.items():
            self._scale *= float(getattr(library, name, None) or 1.0) ** power
        self.takes_positions = "position_ids" in given
        self.documents: Way = "positions" if self.takes_positions and not self.recurrent else "rows"
        """How documents that share a row are kept apart, see `check`."""

    @property
    def isolates(self) -> bool:
        """Whether documents can share a row and not see each other."""
        return self.documents != "rows"

    @property
    def recurrent(self) -> bool:
        """Whether the model carries a state from token to token that no mask can divide."""
        return bool(getattr(self.inner, "_is_stateful", False))

    @property
    def backbone(self) -> Any:
        """transformers' model without its output head."""
        return self.inner.get_decoder()

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks."""
        lists = [module for module in self.backbone.modules() if isinstance(module, nn.ModuleList)]
        named = (one for one in lists if len(one) == self.section.num_layers)
        return next(named, max(lists, key=len, default=nn.ModuleList()))

    @property
    def embedded(self) -> nn.Embedding:
        """The module whose output is the embedded tokens."""
        return self.inner.get_input_embeddings()

    @property
    def head(self) -> Any:
        """transformers' output head."""
        return self.inner.get_output_embeddings()

    @property
    def head_weight(self) -> Tensor:
        """The output head's matrix [V, D]; its bias, if it has one, is the last column."""
        head = self.head
        return head.weight if head.bias is None else torch.cat((head.weight, head.bias[:, None]), 1)

    def resize(self, vocab_size: int) -> None:
        """Give it rows for `vocab_size` token ids. Rows that were there keep their values; new ones are to be filled.
        Do it before the optimizer is built."""
        self.section = self.section.model_copy(update={"vocab_size": vocab_size})
        self.config = replace(self.config, vocab_size=vocab_size)
        with quiet():
            self.inner.resize_token_embeddings(vocab_size, mean_resizing=False)
        _all_rows_learn(self.inner)

    def forward(self, tokens: Tensor, document_ids: Tensor | None = None, cache: LibraryCache | None = None) -> Tensor:
        """Hidden states [B, T, D] of tokens [B, T].

        With document_ids [B, T], positions see only their own document and are counted from its start. With a cache,
        the tokens continue what it holds. Raises InputError for a sequence longer than max_sequence_length.
        """
        if tokens.shape[1] > (limit := self.config.max_sequence_length):
            raise InputError(
                f"a sequence of {tokens.shape[1]} tokens is longer than the {limit} positions of the model; shorten it"
            )
        if cache is not None:
            hidden = cache.read(self.backbone, tokens)
        elif document_ids is None:
            hidden = self._states(tokens)
        elif self.documents == "rows":
            hidden = apart(self._states, tokens, document_ids)  # pyright: ignore[reportCallIssue]  # disable's type
        else:
            arguments = {"position_ids": positions_within(document_ids)}
            if self.documents == "mask":
                arguments["attention_mask"] = mask_within(document_ids)
            hidden = self._states(tokens, **arguments)
        hidden = hidden if self._scale == 1 else hidden * self._scale
        return hidden if self.head.bias is None else torch.cat((hidden, torch.ones_like(hidden[..., :1])), -1)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        head = self.head
        if head.bias is None:
            logits = F.linear(hidden, head.weight)
        else:
            logits = F.linear(hidden[..., :-1], head.weight, head.bias)
        if self.config.softcap is None:
            return logits
        return self.config.softcap * torch.tanh(logits.float() / self.config.softcap)

    def new_cache(self, starts: Tensor, capacity: int) -> LibraryCache:
        """An empty cache for rows that start at columns starts [B]; transformers' own, which grows as needed."""
        return LibraryCache(starts, self.takes_positions, together=self.isolates)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Initialize the weights as transformers does; the same seed of the generator gives the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            self.adopt(_built(self.section))

    def adopt(self, inner: nn.Module) -> None:
        """Take the place of `inner`, one of transformers' models with this configuration, on this model's device."""
        device = self.head.weight.device
        self.inner = _all_rows_learn(inner).to(device).train(self.training)

    def _states(self, tokens: Tensor, **arguments: Tensor) -> Tensor:
        """What transformers' model without its head computes, [B, T, D]."""
        return self.backbone(input_ids=tokens, use_cache=False, **arguments)[0]

    @torch.no_grad()
    def check(self) -> str | None:
        """Compare the logits of a few tokens with transformers' own, and documents in one row with each on its own.

        transformers makes a mask from positions that begin anew, or takes a whole mask; a model that does neither has
        each document in a row of its own from now on, and a sentence that says so is returned. Raises InputError if
        logits are more than a product with the head's matrix.
        """
        training = self.training
        self.eval()
        try:
            tokens = torch.arange(8, device=self.head.weight.device)[None] % self.config.vocab_size
            found, wanted = self.unembed(self(tokens)), self.inner(input_ids=tokens, use_cache=False).logits
            if not wanted.isfinite().all():
                return None  # damaged weights are named where they are looked for
            if not _close(found, wanted):
                raise InputError(
                    f"model_type = {self.section.model_type}: transformers makes its logits from hidden states by more "
                    "than the matrix of its output head, so it cannot be trained here"
                )
            if not self.isolates:
                return None
            ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]], device=tokens.device)
            alone = torch.cat((self(tokens[:, :3]), self(tokens[:, 3:])), 1)
            ways: tuple[Way, ...] = ("positions", "mask")
            for self.documents in ways:
                if _close(self(tokens, ids), alone):
                    return None
            self.documents = "rows"
            return f"transformers' {self.section.model_type} does not keep documents apart that share a row: {UNPACKED}"
        finally:
            self.train(training)


UNPACKED = "each document is computed in a row of its own (data.packing.isolate=true)"


def _built(config: TransformersConfig) -> Any:
    """transformers' model in float32, with random weights from torch's own generator.

    Raises ConfigError for sizes that do not go together, which some architectures notice only here.
    """
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            return _all_rows_learn(AutoModelForCausalLM.from_config(library_config(config.whole), dtype=torch.float32))
    except (ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"model.config: transformers does not build this {config.model_type}: {reason}") from None


def _all_rows_learn(inner: Any) -> Any:
    """The model, in which the padding token's vector is trained too: nothing here is padded with it, and a tokenizer of
    ours may have another token by its id."""
    embedding = inner.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None
    return inner


def _close(found: Tensor, wanted: Tensor) -> bool:
    found, wanted = found.float(), wanted.float()
    return bool((found - wanted).abs().max() <= 1e-3 * wanted.abs().max().clamp(min=1e-6))
