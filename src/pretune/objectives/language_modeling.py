"""Next-token prediction: the loss that training minimises, and the score of each token for evaluation.

B rows, T tokens, D model width, V token ids.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pretune.core.batch import IGNORE, Batch
from pretune.objectives.cross_entropy import linear_cross_entropy


class LanguageModel(Protocol):
    """What an objective asks of a model; a Transformer has it, compiled or not."""

    config: Any
    """With vocab_size and softcap."""

    @property
    def head_weight(self) -> Tensor:
        """[V and padding rows, D]."""
        ...

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        ...

    def __call__(self, tokens: Tensor, document_ids: Tensor | None, /) -> Tensor:
        """Hidden states [B, T, D] of tokens [B, T]."""
        ...


class TokenScores(NamedTuple):
    """What a model made of each target; 0 and False where the target is not scored.

    nll [B, T] float32: negative log-likelihood in nats; correct [B, T] bool: the target was the likeliest id.
    """

    nll: Tensor
    correct: Tensor


def language_modeling(model: LanguageModel, batch: Batch, chunk_tokens: int) -> Tensor:
    """Sum over the scored tokens of the batch of their negative log-likelihood: a float32 scalar, in nats.

    Divide by the number of scored tokens of the whole step, once.
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


@torch.no_grad()
def score_tokens(model: LanguageModel, batch: Batch, chunk_tokens: int) -> TokenScores:
    """Score every target of the batch, without gradients; the logits of `chunk_tokens` positions exist at a time."""
    hidden = model(batch.inputs, batch.document_ids)  # [B, T, D]
    targets = batch.targets.flatten()
    nll, correct = [], []
    for rows, target in zip(hidden.flatten(0, 1).split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        logits = model.unembed(rows).float()  # [C, V]
        scored, index = target != IGNORE, target.clamp(min=0)
        surprise = logits.logsumexp(-1) - logits.gather(-1, index[:, None])[:, 0]
        nll.append(torch.where(scored, surprise, 0))
        correct.append((logits.argmax(-1) == target) & scored)
    return TokenScores(torch.cat(nll).view_as(batch.targets), torch.cat(correct).view_as(batch.targets))
