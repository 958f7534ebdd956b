"""Decoding: continue a batch of prompts token by token with a shared cache.

N texts, B rows of the batch, T tokens, D model width, V token ids.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from pretune.core.config import InputError
from pretune.generation.config import DecodingConfig
from pretune.generation.sampling import History, choose, penalized


class Cache(Protocol):
    """Interface of a model's key-value cache."""

    def to_read(self, tokens: Tensor) -> Tensor:
        """What to read in order to continue with tokens [B, T]: these, or the whole text anew, [B, all and T]."""
        ...

    def advance(self, num_new: int, whole: bool = False) -> None:
        """Announce that the next forward pass reads `num_new` tokens; `whole`: attend over memory of constant shape."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows of the batch."""
        ...


class LanguageModel(Protocol):
    """The model interface that decoding needs; a Transformer has it."""

    config: Any
    """Has max_sequence_length."""

    def new_cache(self, starts: Tensor, capacity: int) -> Cache:
        """A cache of `capacity` columns for rows whose first real token is in column starts [B]."""
        ...

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        ...

    def __call__(self, tokens: Tensor, *, cache: Cache) -> Tensor:
        """Hidden states [B, T, D] of tokens [B, T]."""
        ...


@dataclass(frozen=True)
class Vocabulary:
    """Ids that may be generated (those below `size`), and those among them that end a text."""

    size: int
    end_ids: frozenset[int]


Step = Callable[[Tensor, Cache], Tensor]
"""Logits [B, V] of the token after tokens [B, T]."""

_COLUMNS = 64
"""Caches for compiled steps have a multiple of this many columns, so that only a few shapes are compiled."""


@dataclass(frozen=True)
class Compiled:
    """How steps after the prompt are compiled: for batches of `rows` rows, by `compile`, with the weights built in.

    It takes a second or so per layer and pays off when many tokens are generated.
    """

    rows: int
    compile: Callable[[Step], Step]


class Decoder:
    """A model and the ids that it may generate. All generation goes through this class.

    Steps that are not `compiled` use the result of `packed_copy`, called at the first step: the same model in a form
    that is faster for one token at a time, or None.
    """

    def __init__(
        self,
        model: LanguageModel,
        vocabulary: Vocabulary,
        device: torch.device,
        compiled: Compiled | None = None,
        packed_copy: Callable[[], LanguageModel | None] = lambda: None,
    ) -> None:
        self.model, self.vocabulary, self.device = model, vocabulary, device
        self.compiled_rows = compiled and compiled.rows
        self._packed_copy = packed_copy
        self.limit: int = model.config.max_sequence_length
        self._compiled = compiled and compiled.compile(partial(self._logits, self.model))

    def read(self, prompts: Sequence[Sequence[int]], num_new: int) -> tuple[Tensor, Cache]:
        """Logits [B, V] after each prompt, and the cache with the prompts, which has room for `num_new` more tokens.

        Prompts are padded on the left, so that all end in the same column.
        """
        longest = max(map(len, prompts))
        rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        starts = torch.tensor([longest - len(prompt) for prompt in prompts], dtype=torch.int64, device=self.device)
        capacity = longest + num_new
        if self.compiled_rows is not None:
            capacity = -(-capacity // _COLUMNS) * _COLUMNS
        cache = self.model.new_cache(starts, capacity)
        tokens = cache.to_read(torch.tensor(rows, dtype=torch.int64, device=self.device))
        return self._read(tokens, cache), cache

    def next(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Logits [B, V] after appending one token to each row, tokens [B]."""
        tokens = cache.to_read(tokens[:, None].to(self.device))
        if tokens.shape[1] > 1:
            return self._read(tokens, cache)
        compiled = self._compiled if len(tokens) == self.compiled_rows else None
        cache.advance(1, whole=compiled is not None)
        if compiled is not None:
            with inference(self.model):
                return compiled(tokens, cache)
        with inference(self._stepping):
            return self._logits(self._stepping, tokens, cache)

    def _read(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Logits [B, V] after tokens [B, T]. Not compiled, because prompts rarely have the same shape twice."""
        cache.advance(tokens.shape[1])
        with inference(self.model):
            return self._logits(self.model, tokens, cache)

    @cached_property
    def _stepping(self) -> LanguageModel:
        """The model for single-token steps."""
        return self._packed_copy() or self.model

    def room(self, prompts: Sequence[Sequence[int]], config: DecodingConfig) -> list[int]:
        """The maximum number of new tokens for each text; InputError for a prompt that leaves no room."""
        for number, prompt in enumerate(prompts, start=1):
            if len(prompt) >= self.limit:
                raise InputError(
                    f"prompt {number} has {len(prompt)} tokens, but the model has room for {self.limit}, prompt "
                    "and answer together; shorten it"
                )
        return [min(config.max_new_tokens, self.limit - len(prompt)) for prompt in prompts]

    def _logits(self, model: LanguageModel, tokens: Tensor, cache: Cache) -> Tensor:
        # Only the last position needs logits; ids that the tokenizer does not have are cut off.
        return model.unembed(model(tokens, cache=cache)[:, -1])[:, : self.vocabulary.size]


_NOBODY = -1
"""Marks an unused row in a compiled batch, whose shape must not change."""


class Decoding:
    """Generates N texts, one token at a time.

    A text depends on its prompt, the seed and its number (its place in the list unless `numbers` is given); other texts
    in the batch change it by rounding at most.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        config: DecodingConfig,
        numbers: Sequence[int] | None = None,
    ) -> None:
        self._decoder, self._config = decoder, config
        self._room = decoder.room(prompts, config)
        self._luck = [random.Random(f"{config.seed} {n}") for n in numbers or range(len(prompts))]
        self._rows = list(range(len(prompts)))
        """The index of the text in each row of the batch."""
        missing = (decoder.compiled_rows or 0) - len(prompts)
        prompts = [*prompts, *[prompts[0][:1]] * missing]
        self._rows += [_NOBODY] * missing
        self._history = History(prompts, decoder.vocabulary.size, decoder.device) if config.penalizes else None
        self._logits, self._cache = decoder.read(prompts, max(self._room))
        self._chosen: Tensor | None = None
        self.written: list[list[int]] = [[] for _ in self._room]
        """The tokens of each text so far, including the one that ended it."""

    @property
    def under_way(self) -> list[int]:
        """Indices of the texts that have not ended."""
        return [text for text in self._rows if text != _NOBODY]

    def next_tokens(self) -> dict[int, int]:
        """Generate one more token for each text under way; tokens by text index."""
        if self._chosen is not None:
            self._logits = self._decoder.next(self._chosen, self._cache)
        logits = self._logits
        if self._history is not None:
            logits = penalized(logits, self._config, self._history)
        # Each text has its own random generator, so that it does not depend on when other texts end.
        luck = [0.0 if text == _NOBODY else self._luck[text].random() for text in self._rows]
        self._chosen = choose(logits, self._config, torch.tensor(luck, dtype=torch.float64))
        if self._history is not None:
            self._history.add(self._chosen)
        tokens = dict(zip(self._rows, self._chosen.tolist(), strict=True))
        tokens.pop(_NOBODY, None)
        for text, token in tokens.items():
            self.written[text].append(token)
        return tokens

    def ended(self, text: int) -> Literal["end", "length"] | None:
        """Whether a text has ended, with an end token or because it has no room left."""
        if self.written[text][-1] in self._decoder.vocabulary.end_ids:
            return "end"
        return "length" if len(self.written[text]) >= self._room[text] else None

    def drop(self, texts: Collection[int]) -> None:
        """Stop generating these texts."""
        if not texts:
            return
        if self._decoder.compiled_rows is not None:
            self._rows = [_NOBODY if text in texts else text for text in self._rows]
            return
        going_on = [row for row, text in enumerate(self._rows) if text not in texts]
        self._rows = [self._rows[row] for row in going_on]
        kept = torch.tensor(going_on, dtype=torch.int64)
        assert self._chosen is not None
        self._chosen = self._chosen[kept]
        self._cache.keep(kept.to(self._decoder.device))
        if self._history is not None:
            self._history.keep(kept.to(self._decoder.device))


@contextlib.contextmanager
def inference(model: LanguageModel) -> Iterator[None]:
    """Disable gradients and dropout for the duration of the block, then restore the model's mode."""
    assert isinstance(model, nn.Module)
    was_training = model.training
    if was_training:  # skipped if not needed, because eval() visits every module
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if was_training:
            model.train()
