"""Next-token prediction: the training loss, and per-token scores for evaluation.

B rows, T tokens, D model width, V token ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pretune.core.batch import IGNORE, Batch
from pretune.objectives.config import LanguageModelingConfig
from pretune.objectives.cross_entropy import linear_cross_entropy

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Compiles a function for the shapes that it is called with."""


class LanguageModel(Protocol):
    """The model interface that objectives need; a Transformer has it, compiled or not."""

    config: Any
    """Has vocab_size and softcap."""

    @property
    def head_weight(self) -> Tensor:
        """The output head's matrix [V and padding rows, D]."""
        ...

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        ...

    def __call__(self, tokens: Tensor, document_ids: Tensor | None, /) -> Tensor:
        """Hidden states [B, T, D] of tokens [B, T]."""
        ...


class Scores(Protocol):
    """What scores of tokens have, whatever else there is in them; see TokenScores."""

    @property
    def nll(self) -> Tensor: ...
    @property
    def correct(self) -> Tensor: ...


class TokenScores(NamedTuple):
    """Scores of each target; 0 and False where the target is not scored.

    nll [B, T] float32: negative log-likelihood in nats; correct [B, T] bool: the target was the most likely token.
    """

    nll: Tensor
    correct: Tensor


def language_modeling(model: LanguageModel, batch: Batch, chunk_tokens: int) -> Tensor:
    """Sum of the negative log-likelihood over the scored tokens of the batch: a float32 scalar, in nats.

    Divide it once, by the number of scored tokens in the whole step.
    """
    hidden = model(batch.inputs, batch.document_ids)  # [B, T, D]
    return linear_cross_entropy(
        hidden.flatten(0, 1),
        model.head_weight,
        batch.targets.flatten(),
        model.config.vocab_size,
        model.config.softcap,
        chunk_tokens,
    )


def token_scorer(chunk_tokens: int, compiled: Compile | None = None) -> Callable[[LanguageModel, Batch], TokenScores]:
    """A function that scores every target of a batch, without gradients, `chunk_tokens` positions at a time.

    `compiled` compiles its two parts: the forward pass, for each shape of batch, and the scores of a whole chunk.
    """
    hidden_of, scores_of = (_hidden, _scores) if compiled is None else (compiled(_hidden), compiled(_scores))

    @torch.no_grad()
    def scored(model: LanguageModel, batch: Batch) -> TokenScores:
        targets = batch.targets.flatten()
        found = [torch.zeros_like(targets, dtype=kind) for kind in (torch.float32, torch.bool)]
        along = hidden_of(model, batch), targets.clamp(min=0)
        score_positions(lambda *own: scores_of(model, *own), along, batch, found, chunk_tokens, compiled)
        return TokenScores(*(one.view_as(batch.targets) for one in found))

    return scored


def score_positions(
    scores_of: Callable[..., Sequence[Tensor]],
    along: Sequence[Tensor],
    batch: Batch,
    found: Sequence[Tensor],
    chunk_tokens: int,
    compiled: Compile | None,
) -> None:
    """Fill in `found`, tensors [B T], where the target is scored, with what `scores_of` gives of `chunk_tokens`
    positions of `along`, tensors [B T, ...], at a time. `compiled`: whether it is compiled."""
    # Logits are the largest part, and other positions need none.
    places = (batch.targets.flatten() != IGNORE).nonzero()[:, 0]
    for chunk in places.split(chunk_tokens):
        # Compiled code has one shape: the last chunk is filled up with any position.
        some = chunk if compiled is None else F.pad(chunk, (0, chunk_tokens - len(chunk)))
        for result, values in zip(found, scores_of(*(one[some] for one in along)), strict=True):
            result[chunk] = values[: len(chunk)]


def score_tokens(model: LanguageModel, batch: Batch, chunk_tokens: int) -> TokenScores:
    """Score every target of the batch, without gradients, `chunk_tokens` positions at a time."""
    return token_scorer(chunk_tokens)(model, batch)


def _hidden(model: LanguageModel, batch: Batch) -> Tensor:
    """Hidden states [B T, D]."""
    return model(batch.inputs, batch.document_ids).flatten(0, 1)


def _scores(model: LanguageModel, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood [C] of targets [C] after hidden states [C, D], and whether each was the most likely."""
    return token_scores(model.unembed(rows).float(), targets)


def token_scores(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same of logits [C, V] in float32."""
    return logits.logsumexp(-1) - logits.gather(-1, targets[:, None])[:, 0], logits.argmax(-1) == targets


class NextToken:
    """Next-token prediction: the mean loss over scored tokens."""

    first_loss = None

    def __init__(self, config: LanguageModelingConfig) -> None:
        self._chunk_tokens = config.chunk_tokens

    def sums(self, model: LanguageModel, batch: Batch) -> dict[str, Tensor]:
        return {"loss": language_modeling(model, batch, self._chunk_tokens)}

    def count(self, batch: Batch) -> int:
        return batch.num_scored()

    def scorer(self, compiled: Compile | None = None) -> Callable[[LanguageModel, Batch], TokenScores]:
        return token_scorer(self._chunk_tokens, compiled)

    def metrics(
        self, score: Callable[[Batch], TokenScores], batches: Iterable[Batch], token_bytes: Tensor
    ) -> dict[str, float]:
        return token_metrics(score, batches, token_bytes)


def token_metrics(score: Callable[[Batch], Scores], batches: Iterable[Batch], token_bytes: Tensor) -> dict[str, float]:
    """Loss, perplexity, bits per byte and token accuracy over a whole set; each scored token counts once.

    `token_bytes` [V]: the number of bytes of text of each token id; 0 for the end-of-document token.
    """
    nats = torch.zeros((), dtype=torch.float64)
    tokens = correct = num_bytes = 0
    for batch in batches:
        scores = score(batch)
        scored = batch.targets != IGNORE
        # A float32 sum of a million losses loses digits: sum in float64, on the host because MPS has no float64.
        nats += scores.nll.cpu().double().sum()
        correct += int(scores.correct.sum())
        tokens += int(scored.sum())
        num_bytes += int(token_bytes[batch.targets[scored]].sum())
    loss = float(nats) / max(tokens, 1)
    return {
        "val/loss": loss,
        "val/perplexity": math.exp(min(loss, 700.0)),
        "val/bits_per_byte": float(nats) / math.log(2) / max(num_bytes, 1),
        "val/token_accuracy": correct / max(tokens, 1),
        "val/tokens": tokens,
    }
